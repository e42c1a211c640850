"""Checkpoints travel: other people's weights give here what their own modules give, ours give there what they give
here, and CLIP_benchmark scores them alike."""

import json
import re

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
from test_model import pictures, reference, same, shaken, small, texts

SHAPE = dict(
    image=32,
    patch=8,
    vision=(128, 3, 64),
    text=(64, 2, 1),
    context=20,
    vocab=300,
    embed=48,
)
CLIP_SHAPE = dict(
    image=32,
    patch=16,
    vision=(64, 1, 64),
    text=(64, 1, 1),
    context=77,
    vocab=49408,
    embed=16,
)


# ---- open_clip's layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 40, 64])
@torch.no_grad()
def test_at_another_resolution_positions_are_interpolated_as_by_open_clip(size):
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
    assert all(map(torch.equal, back.parameters(), ours.parameters()))


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
    patches = v.conv1(images).flatten(2).mT
    x = torch.cat([v.class_embedding.expand(2, -1, -1), patches], 1)
    x = x + v.positional_embedding
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
    branches = []
    for h in range(H):
        branches.append(theirs.encode_image(images, normalize=True))  # a branch alone is open_clip's ViT
        for layer in (1, 2):
            for what, value in blocks[layer].mlp.c_proj.named_parameters():
                state[f"visual.transformer.resblocks.{layer}.c_proj.{h}.{what}"] = value.clone()
                state.pop(f"visual.transformer.resblocks.{layer}.mlp.c_proj.{what}", None)
                value.add_(0.1)
    ours = from_state_dict(state, **overrides).eval()
    assert (ours.config.branches, ours.config.branch_type, ours.config.branch_layers) == (H, "mlp", 2)
    assert same(ours.encode_image(images)[0], torch.stack(branches, 1))


# ---- LoTLIP's layout: timm's ViT and transformers' BERT with corner tokens -------------------------------------------

C = 2  # corner tokens


def lotlip(words):
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_base_patch16_224.augreg_in21k",
        num_classes=0,
        img_size=32,
        patch_size=8,
        embed_dim=128,
        depth=2,
        num_heads=2,
    )
    config = transformers.BertConfig(
        vocab_size=words + C,
        hidden_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=512,
        max_position_embeddings=40,
        attn_implementation="eager",
    )
    bert = transformers.BertModel(config)
    shaken(vit)
    shaken(bert)
    proj = torch.randn(128, 128) / 11
    state = {"visual.trunk." + name: value for name, value in vit.state_dict().items()}
    state |= {"text.transformer." + name: value for name, value in bert.state_dict().items()}
    return vit, bert, proj, state | {"text.proj.weight": proj, "logit_scale": torch.tensor(2.0)}


@torch.no_grad()
def bert_with_corners(bert, proj, words, vocabulary):
    """[CLS], corners, words, [SEP] -> summary embeddings [1, 1+C, D], by LoTLIP's mask (2410.05249, section 3.2)."""
    ids = torch.tensor([[101, *range(vocabulary, vocabulary + C), *words, 102]])
    n = ids.shape[1]
    sees = torch.ones(n, n, dtype=torch.bool)
    sees[:, : 1 + C] = False
    sees[1 + C :, 0] = True  # [CLS] is seen by the words
    sees |= torch.eye(n, dtype=torch.bool)  # and it and the corners otherwise by themselves alone
    mask = torch.zeros(1, 1, n, n).masked_fill(~sees, torch.finfo(torch.float32).min)
    hidden = bert.encoder(bert.embeddings(input_ids=ids), attention_mask=mask)[0]
    return F.normalize(bert.pooler.activation(bert.pooler.dense(hidden[:, : 1 + C])) @ proj.T, dim=-1)


def vocabulary(folder):
    """A vocab.txt with [CLS] 101 and [SEP] 102, as bert-base-uncased's."""
    unused = "".join(f"[unused{i}]\n" for i in range(99))
    words = f"[PAD]\n{unused}[UNK]\n[CLS]\n[SEP]\n[MASK]\n.\n,\na\ndog\n##s\nred\nhouse\nis\nit\non"
    (folder / "vocab.txt").write_text(words)
    return len(words.splitlines())


def test_word_pieces_are_berts_with_sentences_parted_and_an_own_end(tmp_path):
    size = vocabulary(tmp_path)
    ours, theirs = WordPieces(tmp_path / "vocab.txt"), transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    for text in ("A red house. It is on dogs", "a dog", "dogs. dogs. unknown", "a " * 30):
        ids = theirs("[SEP]".join(text.split(". ")), max_length=12, truncation=True)["input_ids"]
        assert ours([text], 12).tolist() == [[*ids[:-1], size] + [0] * (12 - len(ids))] and ids[-1] == 102
    assert ours.vocab_size == size + 1


@torch.no_grad()
def test_lotlips_release_is_timms_vit_and_berts_text_tower_with_corners(tmp_path):
    size = vocabulary(tmp_path)
    vit, bert, proj, state = lotlip(words=size)
    ddp = {"module." + name: value for name, value in state.items()}
    torch.save({"epoch": 32, "state_dict": ddp, "optimizer": {"lr": 1e-3}}, tmp_path / "model.pt")
    model = Model(tmp_path / "model.pt", "cpu")
    assert (model.config.corner_tokens, model.config.context, model.config.vocab) == (C, 40 - C, size + 1)
    images = pictures(3, 32)
    branches, patches = model.clip.encode_image(images)
    assert same(branches[:, 0], F.normalize(vit(images), dim=-1))
    assert same(patches, F.normalize(vit.forward_features(images)[:, 1:], dim=-1))
    for words in ([5, 9, 110], [7], [102, 33, 102, 4, 8, 60, 61, 62]):  # [SEP] between sentences, too
        tokens = torch.tensor([[101, *words, size, 0, 0]])  # the last [SEP] is the vocabulary's last
        assert same(model.clip.encode_text(tokens)[0], bert_with_corners(bert, proj, words, size))
    words = WordPieces(tmp_path / "vocab.txt").pieces.encode("a red house[SEP]it is on").ids[1:-1]
    assert same(model.texts(["A red house. It is on"]), bert_with_corners(bert, proj, words, size)[:, 0])


# ---- files: what a checkpoint file may be, and what it may not -------------------------------------------------------


@pytest.mark.parametrize("dress", ["custom text", "hub, quickgelu", "safetensors", "openai"])
@torch.no_grad()
def test_a_released_file_is_read_with_the_activation_of_its_training(dress, tmp_path, capsys):
    activation = "quickgelu" if dress in ("hub, quickgelu", "openai") else "gelu"
    theirs, _ = reference(CLIP_SHAPE, activation == "quickgelu")
    path, state = tmp_path / "weights.pt", theirs.state_dict()
    if dress == "custom text":
        state = {re.sub("^(?!visual|logit_scale)", "text.", name): value for name, value in state.items()}
    if dress == "hub, quickgelu":
        config = dict(quick_gelu=True, vision_cfg=dict(width=64), text_cfg=dict(width=64, heads=1))
        (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config)))
    if dress == "openai":  # three numbers beside the weights: by them the activation is known
        state |= dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(1))
    if dress == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        torch.save(state, path)
    model = Model(path, "cpu")
    assert f"activation {activation} (" in capsys.readouterr().out
    said = ["a dog on a sofa", "A house. It is red."]
    tokens = open_clip.get_tokenizer("ViT-B-32")(said)
    assert same(model.texts(said), theirs.encode_text(tokens, normalize=True))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    (branches,) = model.images([(image,) for image in images])
    assert same(branches[:, 0], theirs.encode_image(normalize(images), normalize=True))


def test_a_run_is_read_from_its_folder_or_a_file_in_it(tmp_path):
    ours = small(branches=3)
    settings = vars(ours.config) | dict(method="holistic", lr=1e-3)
    assert write_whole(tmp_path / "checkpoint.pt", dict(settings=settings, model=ours.state_dict(), step=7))
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        model, read = load_model(path)
        assert model.config == ours.config and read == settings
        assert all(map(torch.equal, model.parameters(), ours.parameters()))


class Unsafe:
    def __reduce__(self):
        return print, ("this ran",)


def test_files_that_are_no_whole_plain_checkpoint_end_in_a_sentence(tmp_path, capsys):
    state = reference(CLIP_SHAPE)[0].state_dict()
    contents = {
        "is refused": dict(state_dict=state, args=Unsafe()),
        "holds no state dict": dict(settings={}),
        "or another architecture": state | {"visual.attn_pool.query": torch.zeros(1)},
        "not the state dict of an open_clip ViT": {"visual.layer1.0.conv1.weight": torch.zeros(1)},
    }
    paths = {"does not exist": tmp_path / "gone.pt"}
    for i, (reason, content) in enumerate(contents.items()):
        paths[reason] = tmp_path / f"{i}.pt"
        torch.save(content, paths[reason])
    paths["not a whole checkpoint"] = tmp_path / "half.pt"
    paths["not a whole checkpoint"].write_bytes(paths["is refused"].read_bytes()[:200_000])
    paths["TorchScript"] = tmp_path / "script.pt"
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(paths["TorchScript"]))
    for reason, path in paths.items():
        with pytest.raises(UserError, match=f"{path.name}.*{reason}") as caught:
            load_model(path)
        assert "\n" not in str(caught.value)
    assert "this ran" not in capsys.readouterr().out


# ---- there and back: train, export, open_clip, CLIP_benchmark --------------------------------------------------------


def test_a_model_trained_here_scores_in_open_clip_as_clip_benchmark_says(tmp_path):
    """The command exports it; the scenes are of uneven size, and some captions longer than the context."""
    run, weights = tmp_path / "run", tmp_path / "nano-export.pt"
    flags = dict(
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
        out=str(run),
    )
    train.train(flags)
    evaluate.main([str(run), "--export", "open_clip", str(weights)])
    open_clip.add_model_config(tmp_path / "nano-export.json")
    theirs, _, prepare = open_clip.create_model_and_transforms("nano-export", pretrained=str(weights))
    scenes, rows, images = Scenes("test", 60, 56, 6), [], []
    for i in range(60):
        scene = scenes.scene(i)
        path = tmp_path / f"{i}.png"
        Image.fromarray(scenes.draw(scene)[0]).resize((56 + i % 9, 50)).save(path)
        captions = [scene.captions["raw"] + " word" * i, scene.captions["short"], *scene.captions["long"][: i % 3]]
        rows.append(dict(image=path.name, caption=captions))
        images.append(prepare(Image.open(path)))
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))

    batch = torch.stack(images), [row["caption"] for row in rows]
    tokenizer = open_clip.get_tokenizer("nano-export")
    expected = zeroshot_retrieval.evaluate(theirs.eval(), [batch], tokenizer, "cpu", False, [1, 5, 10])
    found = evaluate.run_benchmarks(Model(run, "cpu"), [f"jsonl:{tmp_path / 'pairs.jsonl'}"])
    for k in (1, 5, 10):
        for way, name in (("T2I", "image"), ("I2T", "text")):
            recall = expected[f"{name}_retrieval_recall@{k}"]
            assert found[f"jsonl {way} R@{k}"][0] / 100 == pytest.approx(recall, abs=1e-6)
    assert 0 < found["jsonl T2I R@10"][0] < 100
