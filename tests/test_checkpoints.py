"""Checkpoints travel: other people's weights give here what their own modules give, ours give there what they give
here, and CLIP_benchmark scores them alike."""

import copy
import json

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from clip_benchmark.metrics import zeroshot_retrieval
from PIL import Image
from safetensors.torch import save_file

import evaluate
import train
from data import UserError, WordPieces, normalize
from evaluate import Model
from model import export_open_clip, from_state_dict, load_model, resized, write_whole
from scenes import Scenes
from test_model import pictures, reference, same, small, texts

SHAPE = dict(image=32, patch=8, vision=(128, 3, 64), text=(64, 2, 1), context=20, vocab=300, embed=48)
CLIP_SHAPE = dict(image=32, patch=16, vision=(64, 1, 64), text=(64, 1, 1), context=77, vocab=49408, embed=16)


@torch.no_grad()
def shaken(module):
    """The module with every weight moved away from its initial value, also those that start at 0 or 1."""
    for p in module.parameters():
        p.add_(0.05 * torch.randn_like(p))
    return module.eval()


# ---- open_clip's layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 40, 64])
@torch.no_grad()
def test_at_another_resolution_the_positions_are_interpolated_as_open_clip_does(size):
    theirs, overrides = reference(SHAPE)
    other, _ = reference({**SHAPE, "image": size})
    state = theirs.state_dict()
    ours = resized(from_state_dict(state, **overrides), size)
    open_clip.model.resize_pos_embed(state, other)
    other.load_state_dict(state)
    images = pictures(2, size)
    assert same(ours.encode_image(images)[0][:, 0], other.encode_image(images, normalize=True))


@pytest.mark.parametrize("settings", [dict(), dict(pool="average"), dict(activation="quickgelu")], ids=str)
@torch.no_grad()
def test_what_is_exported_open_clip_loads_strictly_and_embeds_alike(settings, tmp_path):
    ours = small(**settings)
    export_open_clip(ours, tmp_path / "exported.pt")
    open_clip.add_model_config(tmp_path / "exported.json")
    theirs = open_clip.create_model("exported", pretrained=str(tmp_path / "exported.pt")).eval()
    images, tokens = pictures(3), texts(6, 12, 3)
    assert same(theirs.encode_image(images, normalize=True), ours.encode_image(images)[0][:, 0])
    assert same(theirs.encode_text(tokens, normalize=True), ours.encode_text(tokens)[0][:, 0])
    back, settings = load_model(tmp_path / "exported.pt")
    assert back.config == ours.config and settings["method"] == "exported"
    for a, b in zip(back.parameters(), ours.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("settings", [dict(branches=2), dict(corner_tokens=1), dict(stem="conv")], ids=str)
def test_what_open_clip_cannot_hold_is_not_exported(settings, tmp_path):
    with pytest.raises(
        UserError, match="open_clip's CLIP has .*one branch, no corner tokens and causal text: this"
    ):
        export_open_clip(small(**settings), tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


# ---- Holistic CLIP's layouts: open_clip's modules, with H class tokens or H parallel MLPs ----------------------------


@pytest.mark.parametrize("blind", [False, True])
@torch.no_grad()
def test_several_class_tokens_with_a_position_each_are_holistic_clips(blind):
    """Blind to one another (2412.00440, section 3.2), or as the release computes it: the mask is an addend of 1."""
    theirs, overrides = reference(SHAPE)
    v, H, images = theirs.visual, 3, pictures(2, 32)
    v.class_embedding = torch.nn.Parameter(torch.randn(H, 128))
    v.positional_embedding = torch.nn.Parameter(torch.randn(H + 16, 128))
    x = (
        torch.cat([v.class_embedding.expand(2, -1, -1), v.conv1(images).flatten(2).mT], 1)
        + v.positional_embedding
    )
    added = torch.zeros(H + 16, H + 16)
    added[:H, :H] = (1 - torch.eye(H)) * (-1e9 if blind else 1)
    x = v.transformer(v.ln_pre(x), attn_mask=added)
    expected = F.normalize(v.ln_post(x)[:, :H] @ v.proj, dim=-1)

    ours = from_state_dict(theirs.state_dict(), branch_mask=blind, **overrides).eval()
    assert same(ours.encode_image(images)[0], expected)
    assert not from_state_dict(theirs.state_dict(), **overrides).config.branch_mask


@torch.no_grad()
def test_parallel_mlps_are_holistic_clips():
    """Their names: the shared first layer is mlp.c_fc, the H second ones c_proj.0 to c_proj.H-1, in the last layers."""
    theirs, overrides = reference(SHAPE)
    H, state, images = 3, theirs.state_dict(), pictures(2, 32)
    blocks = theirs.visual.transformer.resblocks
    branches = [
        theirs.encode_image(images, normalize=True)
    ]  # a branch alone is open_clip's ViT with its layers
    for h in range(H):
        for layer in (1, 2):
            for what, value in blocks[layer].mlp.c_proj.named_parameters():
                state[f"visual.transformer.resblocks.{layer}.c_proj.{h}.{what}"] = value.clone()
                state.pop(f"visual.transformer.resblocks.{layer}.mlp.c_proj.{what}", None)
                value.add_(0.1)
        branches.append(theirs.encode_image(images, normalize=True))
    ours = from_state_dict(state, **overrides).eval()
    assert (ours.config.branches, ours.config.branch_type, ours.config.branch_layers) == (H, "mlp", 2)
    assert same(ours.encode_image(images)[0], torch.stack(branches[:H], 1))


# ---- LoTLIP's layout: timm's ViT and transformers' BERT with corner tokens -------------------------------------------

V, C = 120, 2  # BERT's words, corner tokens


def lotlip(words=V):
    torch.manual_seed(0)
    vit = shaken(
        timm.create_model(
            "vit_base_patch16_224.augreg_in21k",
            pretrained=False,
            num_classes=0,
            img_size=32,
            global_pool="token",
            patch_size=8,
            embed_dim=128,
            depth=2,
            num_heads=2,
        )
    )
    bert = shaken(
        transformers.BertModel(
            transformers.BertConfig(
                vocab_size=words + C,
                hidden_size=128,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=512,
                max_position_embeddings=40,
                attn_implementation="eager",
            )
        )
    )
    proj = torch.randn(128, 128) / 11
    state = {"visual.trunk." + name: value for name, value in vit.state_dict().items()}
    state |= {"text.transformer." + name: value for name, value in bert.state_dict().items()}
    return vit, bert, proj, state | {"text.proj.weight": proj, "logit_scale": torch.tensor(2.0)}


@torch.no_grad()
def bert_with_corners(bert, proj, words, vocabulary=V):
    """[CLS], corners, words, [SEP] -> summary embeddings [1, 1+C, D], by LoTLIP's mask (2410.05249, section 3.2)."""
    ids = torch.tensor([[101, *range(vocabulary, vocabulary + C), *words, 102]])
    n = ids.shape[1]
    sees = torch.ones(n, n, dtype=torch.bool)
    sees[:, : 1 + C] = torch.eye(n, dtype=torch.bool)[
        :, : 1 + C
    ]  # [CLS] and corners: seen by themselves alone
    sees[1 + C :, 0] = True  # but [CLS] by the words, too
    mask = torch.zeros(1, 1, n, n).masked_fill(~sees, torch.finfo(torch.float32).min)
    hidden = bert.encoder(bert.embeddings(input_ids=ids), attention_mask=mask)[0]
    return F.normalize(bert.pooler.activation(bert.pooler.dense(hidden[:, : 1 + C])) @ proj.T, dim=-1)


@torch.no_grad()
def test_lotlips_release_is_timms_vit_and_berts_text_tower_with_corners():
    vit, bert, proj, state = lotlip()
    before = copy.deepcopy(state)
    ours = from_state_dict(state).eval()
    assert all(torch.equal(value, before[name]) for name, value in state.items())  # reading changes nothing
    assert (ours.config.corner_tokens, ours.config.context, ours.config.vocab) == (C, 40 - C, V + 1)
    images = pictures(3, 32)
    branches, patches = ours.encode_image(images)
    assert same(branches[:, 0], F.normalize(vit(images), dim=-1))
    assert same(patches, F.normalize(vit.forward_features(images)[:, 1:], dim=-1))
    for words in ([5, 9, 110], [7], [102, 33, 102, 4, 8, 60, 61, 62]):  # [SEP] between sentences, too
        tokens = torch.tensor([[101, *words, V, 0, 0]])  # the last [SEP] is the vocabulary's last
        assert same(ours.encode_text(tokens)[0], bert_with_corners(bert, proj, words))


def vocabulary(folder):
    """A vocab.txt with [CLS] 101 and [SEP] 102, as bert-base-uncased's."""
    words = [
        "[PAD]",
        *(f"[unused{i}]" for i in range(99)),
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ".",
        ",",
        "a",
        "dog",
        "##s",
        "red",
        "house",
        "is",
        "it",
        "on",
    ]
    (folder / "vocab.txt").write_text("\n".join(words))
    return len(words)


def test_word_pieces_are_berts_with_sentences_parted_and_an_end_of_their_own(tmp_path):
    size = vocabulary(tmp_path)
    ours, theirs = WordPieces(tmp_path / "vocab.txt"), transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    for text in ("A red house. It is on dogs", "a dog", "dogs. dogs. unknown", "a " * 30):
        ids = theirs("[SEP]".join(text.split(". ")), max_length=12, truncation=True)["input_ids"]
        assert ours([text], 12).tolist() == [[*ids[:-1], size] + [0] * (12 - len(ids))] and ids[-1] == 102
    assert ours.vocab_size == size + 1


@torch.no_grad()
def test_a_file_of_lotlips_is_read_with_berts_vocabulary_beside_it(tmp_path):
    size = vocabulary(tmp_path)
    _, bert, proj, state = lotlip(words=size)
    ddp = {"module." + name: value for name, value in state.items()}
    torch.save({"epoch": 32, "state_dict": ddp, "optimizer": {"lr": 1e-3}}, tmp_path / "model.pt")
    model = Model(tmp_path / "model.pt", "cpu")
    words = WordPieces(tmp_path / "vocab.txt").pieces.encode("a red house[SEP]it is on").ids[1:-1]
    assert model.settings["corner_tokens"] == C
    assert same(model.texts(["A red house. It is on"]), bert_with_corners(bert, proj, words, size)[:, 0])


# ---- files: what a checkpoint file may be, and what it may not -------------------------------------------------------


@pytest.mark.parametrize("dress", ["custom text", "hub, quickgelu", "safetensors", "openai", "flag"])
@torch.no_grad()
def test_released_files_are_read_with_the_activation_they_were_trained_with(dress, tmp_path, capsys):
    quick = dress in ("hub, quickgelu", "openai", "flag")
    theirs, _ = reference(CLIP_SHAPE, quick)
    path, state = tmp_path / "weights.pt", theirs.state_dict()
    if dress == "custom text":
        names = [name if name.startswith(("visual", "logit_scale")) else "text." + name for name in state]
        state = dict(zip(names, state.values()))
    if dress == "hub, quickgelu":
        config = dict(quick_gelu=True, vision_cfg=dict(width=64), text_cfg=dict(width=64, heads=1))
        (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config)))
    if dress == "openai":  # three numbers beside the weights: by them the activation is known
        state = state | {
            name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")
        }
    if dress == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        torch.save(state, path)
    model = Model(path, "cpu", activation="quickgelu" if dress == "flag" else None)
    assert model.config.activation == ("quickgelu" if quick else "gelu")
    assert f"activation {model.config.activation} (" in capsys.readouterr().out
    said = ["a dog on a sofa", "A house. It is red."]
    assert same(
        model.texts(said), theirs.encode_text(open_clip.get_tokenizer("ViT-B-32")(said), normalize=True)
    )
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    (branches,) = model.images([(image,) for image in images])
    assert same(branches[:, 0], theirs.encode_image(normalize(images), normalize=True))


def test_a_run_is_read_from_its_folder_or_its_file_and_an_average_it_kept_counts(tmp_path):
    ours, average = small(branches=3), [torch.randn_like(p) for p in small(branches=3).parameters()]
    settings = vars(ours.config) | dict(method="holistic", lr=1e-3)
    content = dict(settings=settings, model=ours.state_dict(), step=7)
    assert write_whole(tmp_path / "checkpoint.pt", content)
    assert write_whole(tmp_path / "best.pt", content | dict(average=average))
    for path, expected in ((tmp_path, ours.parameters()), (tmp_path / "best.pt", average)):
        model, read = load_model(path)
        assert model.config == ours.config and read == settings
        for a, b in zip(model.parameters(), expected, strict=True):
            assert torch.equal(a, b)


class Unsafe:
    def __reduce__(self):
        return print, ("this ran",)


def write_bad_files(folder):
    state = reference(CLIP_SHAPE)[0].state_dict()
    bert = {name: value for name, value in lotlip()[-1].items() if "query" not in name}
    contents = {
        "unsafe.pt": {"state_dict": state, "args": Unsafe()},
        "settings.pt": {"settings": {}},
        "tower.pt": {name: value for name, value in state.items() if "visual" in name},
        "more.pt": state | {"visual.attn_pool.query": torch.zeros(1)},
        "resnet.pt": {"visual.layer1.0.conv1.weight": torch.zeros(1), "text_projection": torch.zeros(1)},
        "bert.pt": bert,
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
    (folder / "half.pt").write_bytes((folder / "more.pt").read_bytes()[:200_000])
    (folder / "page.pt").write_text("<html>not found</html>")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(folder / "script.pt"))


def test_files_that_are_no_whole_plain_checkpoint_end_in_a_sentence(tmp_path, capsys):
    write_bad_files(tmp_path)
    reasons = {
        "unsafe.pt": "is refused",
        "half.pt": "not a whole checkpoint",
        "page.pt": "not a whole checkpoint",
        "settings.pt": "holds no state dict",
        "script.pt": "TorchScript",
        "tower.pt": "half a checkpoint",
        "more.pt": "or another architecture",
        "bert.pt": "half a checkpoint",
        "resnet.pt": "not the state dict of an open_clip ViT",
        "gone.pt": "does not exist",
    }
    for name, words in reasons.items():
        with pytest.raises(UserError, match=f"{name}.*{words}") as caught:
            load_model(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert "this ran" not in capsys.readouterr().out


# ---- there and back: train, export, open_clip, CLIP_benchmark --------------------------------------------------------


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model trained here, exported by the command and read by open_clip; scenes of uneven size with captions."""
    root = tmp_path_factory.mktemp("exported")
    train.train(
        dict(
            method="clip",
            size="nano",
            stem="patch",
            tokenizer="clip",
            images=640,
            batch=32,
            eval_images=0,
            context=77,
            workers=0,
            device="cpu",
            out=str(root / "run"),
        )
    )
    evaluate.main([str(root / "run"), "--export", "open_clip", str(root / "nano-export.pt")])
    open_clip.add_model_config(root / "nano-export.json")
    theirs, _, prepare = open_clip.create_model_and_transforms(
        "nano-export", pretrained=str(root / "nano-export.pt")
    )
    scenes, rows = Scenes("test", 60, 56, 6), []
    for i in range(60):
        scene = scenes.scene(i)
        Image.fromarray(scenes.draw(scene)[0]).resize((56 + i % 9, 50)).save(root / f"{i}.png")
        captions = [scene.captions["raw"], scene.captions["short"], *scene.captions["long"][: i % 3]]
        rows.append(dict(image=f"{i}.png", caption=captions))
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    images = torch.stack([prepare(Image.open(root / row["image"])) for row in rows])
    return root, Model(root / "run", "cpu"), theirs.eval(), images, [row["caption"] for row in rows]


@torch.no_grad()
def test_a_model_trained_here_gives_the_same_features_in_open_clip(exported):
    root, ours, theirs, images, captions = exported
    said = [*captions[0], "word " * 200]
    tokens = open_clip.get_tokenizer("nano-export")(said)
    assert same(theirs.encode_text(tokens, normalize=True), ours.texts(said))
    pictures = [Image.open(root / f"{i}.png") for i in range(9)]
    (branches,) = ours.images([(evaluate.preparation(32)(picture),) for picture in pictures])
    assert same(branches[:, 0], theirs.encode_image(images[:9], normalize=True))


def test_retrieval_numbers_are_open_clips_and_clip_benchmarks(exported):
    root, ours, theirs, images, captions = exported
    tokenizer = open_clip.get_tokenizer("nano-export")
    expected = zeroshot_retrieval.evaluate(theirs, [(images, captions)], tokenizer, "cpu", False, [1, 5, 10])
    found = evaluate.run_benchmarks(ours, [f"jsonl:{root / 'pairs.jsonl'}"])
    for k in (1, 5, 10):
        for way, name in (("T2I", "image"), ("I2T", "text")):
            recall = expected[f"{name}_retrieval_recall@{k}"]
            assert found[f"jsonl {way} R@{k}"][0] / 100 == pytest.approx(recall, abs=1e-6)
    assert 0 < found["jsonl T2I R@10"][0] < 100
