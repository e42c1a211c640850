"""Checkpoints travel: other people's weights give here what their own modules give, ours give there what they give
here, and CLIP_benchmark scores them alike."""
import json
import pickle

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from torchvision.datasets import ImageFolder

import evaluate
import train
from data import UserError, WordPieces
from evaluate import Model
from model import CLIP, CLIPConfig, from_state_dict, resized, to_open_clip
from scenes import KINDS, Scenes
from test_model import SMALL, pictures, reference, same, texts

# CLIP_benchmark 1.6.2 calls float() on arrays of one number, which numpy 2.4 no longer takes
zeroshot_classification.float = lambda x: x.item() if hasattr(x, "item") else float(x)

SHAPE = dict(image=32, patch=8, vision=(128, 3, 64), text=(64, 2, 1), context=20, vocab=300, embed=48)


@torch.no_grad()
def shaken(module, seed=0, by=0.05):
    """The module with every weight moved away from its initial value, also those that start at 0 or 1."""
    torch.manual_seed(seed)
    for p in module.parameters():
        p.add_(by * torch.randn_like(p))
    return module.eval()


# ---- open_clip's layout ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dress", ["plain", "ddp", "custom text", "openai"])
@torch.no_grad()
def test_the_dresses_open_clips_layout_comes_in_hold_the_same_model(dress):
    theirs, _ = reference(SHAPE, quick=dress == "openai")
    state = theirs.state_dict()
    if dress == "ddp":
        state = {"module." + name: value for name, value in state.items()}
    if dress == "custom text":
        tower = ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection")
        state = {"text." * name.startswith(tower) + name: value for name, value in state.items()}
    if dress == "openai":  # half precision, and three numbers beside the weights: by them the activation is known
        state = state | {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    ours = from_state_dict(state).eval()
    images, tokens = pictures(3, 32), texts(3, 20, 7, vocab=300, width=20)
    assert same(ours.encode_image(images)[0][:, 0], theirs.encode_image(images, normalize=True))
    assert same(ours.encode_text(tokens)[0][:, 0], theirs.encode_text(tokens, normalize=True))


@pytest.mark.parametrize("size", [16, 40, 64])
@torch.no_grad()
def test_at_another_resolution_the_positions_are_interpolated_as_open_clip_does(size):
    theirs, overrides = reference(SHAPE, quick=False)
    other, _ = reference({**SHAPE, "image": size}, quick=False)
    state = theirs.state_dict()
    open_clip.model.resize_pos_embed(state, other)
    other.load_state_dict(state)
    images = pictures(2, size)
    ours = resized(from_state_dict(theirs.state_dict(), **overrides), size)
    assert ours.config.image_size == size
    assert same(ours.encode_image(images)[0][:, 0], other.encode_image(images, normalize=True))


@pytest.mark.parametrize("settings", [dict(), dict(pool="average"), dict(activation="quickgelu")], ids=str)
@torch.no_grad()
def test_what_is_exported_open_clip_loads_strictly_and_embeds_alike(settings, tmp_path):
    ours = shaken(CLIP(CLIPConfig(**{**SMALL, **settings})))
    state, config = to_open_clip(ours)
    torch.save(state, tmp_path / "x.pt")
    (tmp_path / "x-model.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "x-model.json")
    theirs = open_clip.create_model("x-model", pretrained=str(tmp_path / "x.pt")).eval()  # load_state_dict(strict=True)
    images, tokens = pictures(3), texts(6, 12, 3)
    assert same(theirs.encode_image(images, normalize=True), ours.encode_image(images)[0][:, 0])
    assert same(theirs.encode_text(tokens, normalize=True), ours.encode_text(tokens)[0][:, 0])
    assert torch.equal(theirs.logit_scale, ours.logit_scale)


# ---- Holistic CLIP's layouts: open_clip's modules, with H class tokens or H parallel MLPs ----------------------------

def holistic_class_tokens(vision, images, H, blind):
    """open_clip's vision tower with H class tokens: blind to one another (2412.00440, section 3.2), or as the release
    computes it, where the mask is an addend of 1."""
    v = vision
    x = v.conv1(images).flatten(2).mT
    x = torch.cat([v.class_embedding.expand(len(x), -1, -1), x], 1) + v.positional_embedding
    added = torch.zeros(x.shape[1], x.shape[1])
    added[:H, :H] = (1 - torch.eye(H)) * (-1e9 if blind else 1)
    x = v.transformer(v.ln_pre(x), attn_mask=added)
    return F.normalize(v.ln_post(x)[:, :H] @ v.proj, dim=-1)


@pytest.mark.parametrize("blind", [False, True])
@torch.no_grad()
def test_several_class_tokens_with_a_position_each_are_holistic_clips(blind):
    theirs, overrides = reference(SHAPE, quick=False)
    v, H = theirs.visual, 3
    v.class_embedding = torch.nn.Parameter(torch.randn(H, 128))
    v.positional_embedding = torch.nn.Parameter(torch.randn(H + 16, 128))
    ours = from_state_dict(theirs.state_dict(), **overrides, **(dict(branch_mask=True) if blind else {})).eval()
    assert ours.config.branches == H and ours.config.branch_type == "class" and ours.config.image_size == 32
    assert same(ours.encode_image(pictures(2, 32))[0], holistic_class_tokens(v, pictures(2, 32), H, blind))
    attn, x = ours.visual.blocks[0].attn, torch.randn(2, 19, 128)
    weighted = (attn.weights(x, ours.visual.mask) @ attn.split(x)[2]).transpose(1, 2).flatten(2)
    assert same(attn.out(weighted), attn(x, ours.visual.mask))


@torch.no_grad()
def test_parallel_mlps_are_holistic_clips():
    """Their names: the shared first layer is mlp.c_fc, the H second ones c_proj.0 ... c_proj.H-1, in the last layers.
    """
    theirs, overrides = reference(SHAPE, quick=False)
    H, state = 3, theirs.state_dict()
    for layer in (1, 2):
        for what in ("weight", "bias"):
            one = state.pop(f"visual.transformer.resblocks.{layer}.mlp.c_proj.{what}")
            for h in range(H):
                state[f"visual.transformer.resblocks.{layer}.c_proj.{h}.{what}"] = one + 0.1 * h
    ours = from_state_dict(state, **overrides).eval()
    assert (ours.config.branches, ours.config.branch_type, ours.config.branch_layers) == (H, "mlp", 2)
    branches = []
    for h in range(H):  # a branch alone is open_clip's ViT with that branch's layers
        for layer in (1, 2):
            c_proj = theirs.visual.transformer.resblocks[layer].mlp.c_proj
            for what in ("weight", "bias"):
                getattr(c_proj, what).copy_(state[f"visual.transformer.resblocks.{layer}.c_proj.{h}.{what}"])
        branches.append(theirs.encode_image(pictures(2, 32), normalize=True))
    assert same(ours.encode_image(pictures(2, 32))[0], torch.stack(branches, 1))


# ---- LoTLIP's layout: timm's ViT and transformers' BERT with corner tokens -------------------------------------------

V, C, CONTEXT = 120, 2, 16  # BERT's words, corner tokens, places of a text (corners not counted)


def lotlip(seed=0, words=V):
    torch.manual_seed(seed)
    vit = shaken(timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=False, num_classes=0, img_size=32,
                                   global_pool="token", patch_size=8, embed_dim=128, depth=2, num_heads=2), seed)
    bert = shaken(transformers.BertModel(transformers.BertConfig(
        vocab_size=words + C, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=40, attn_implementation="eager")), seed + 1)
    proj = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)) / 11
    state = {"visual.trunk." + name: value for name, value in vit.state_dict().items()}
    state |= {"text.transformer." + name: value for name, value in bert.state_dict().items()}
    return vit, bert, proj, state | {"text.proj.weight": proj, "logit_scale": torch.tensor(2.0)}


@torch.no_grad()
def bert_with_corners(bert, proj, words, vocabulary=V):
    """[CLS], corners, words, [SEP] -> summary embeddings [1, 1+C, D], by LoTLIP's mask (2410.05249, section 3.2)."""
    ids = torch.tensor([[101, *range(vocabulary, vocabulary + C), *words, 102]])
    n = ids.shape[1]
    sees = torch.ones(n, n, dtype=torch.bool)
    sees[:, :1 + C] = torch.eye(n, dtype=torch.bool)[:, :1 + C]  # [CLS] and corners: seen by themselves alone
    sees[1 + C:, 0] = True  # but [CLS] by the words, too
    mask = torch.zeros(1, 1, n, n).masked_fill(~sees, torch.finfo(torch.float32).min)
    hidden = bert.encoder(bert.embeddings(input_ids=ids), attention_mask=mask)[0]
    return F.normalize(bert.pooler.activation(bert.pooler.dense(hidden[:, :1 + C])) @ proj.T, dim=-1)


@torch.no_grad()
def test_lotlips_release_is_timms_vit_and_berts_text_tower_with_corners():
    vit, bert, proj, state = lotlip()
    ours = from_state_dict(state, context=CONTEXT).eval()
    assert (ours.config.corner_tokens, ours.config.context, ours.config.vocab) == (C, CONTEXT, V + 1)
    images = pictures(3, 32)
    branches, patches = ours.encode_image(images)
    assert same(branches[:, 0], F.normalize(vit(images), dim=-1))
    assert same(patches, F.normalize(vit.forward_features(images)[:, 1:], dim=-1))
    tokens = torch.zeros(3, CONTEXT, dtype=torch.long)
    for row, words in zip(tokens, ([5, 9, 110], [7], [102, 33, 102, 4, 8, 60, 61, 62])):  # [SEP] between sentences, too
        row[:len(words) + 2] = torch.tensor([101, *words, V])  # the last [SEP] is the vocabulary's last
        summaries, _ = ours.encode_text(row[None])
        assert same(summaries, bert_with_corners(bert, proj, words))
    alone = torch.cat([ours.encode_text(row[None])[0] for row in tokens])
    assert same(ours.encode_texts(tokens)[0], alone)


@torch.no_grad()
def test_without_corners_the_bert_tower_is_transformers_bert():
    _, bert, proj, state = lotlip()
    ours = from_state_dict(state, corner_tokens=0, context=CONTEXT).eval()
    theirs = bert(input_ids=torch.tensor([[101, 5, 9, 110, 102]])).pooler_output @ proj.T
    found, _ = ours.encode_text(torch.tensor([[101, 5, 9, 110, V + C, 0, 0]]))
    assert same(found[:, 0], F.normalize(theirs, dim=-1))


# ---- what is not one ------------------------------------------------------------------------------------------------

def broken(name):
    state = reference(SHAPE, quick=False)[0].state_dict()
    return {
        "half": {k: v for k, v in state.items() if "resblocks.1" not in k},
        "no text": {k: v for k, v in state.items() if k.startswith("visual.")},
        "more": state | {"visual.attn_pool.query": torch.zeros(1)},
        "resnet": {"visual.layer1.0.conv1.weight": torch.zeros(1), "text_projection": torch.zeros(1)},
        "half a LoTLIP": {k: v for k, v in lotlip()[-1].items() if "query" not in k},
    }[name]


@pytest.mark.parametrize("name", ["half", "no text", "more", "resnet", "half a LoTLIP"])
def test_half_a_checkpoint_and_other_architectures_are_refused_in_a_sentence(name):
    with pytest.raises(UserError, match="half a checkpoint, or another architecture|not the state dict of") as caught:
        from_state_dict(broken(name))
    assert "\n" not in str(caught.value)


def test_reading_a_checkpoint_leaves_the_callers_tensors_alone():
    for state in (lotlip()[-1], reference(SHAPE, quick=False)[0].state_dict()):
        before = {name: value.clone() for name, value in state.items()}
        from_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in state.items())


# ---- files: what a checkpoint file may be, and what it may not -------------------------------------------------------

CLIP_SHAPE = dict(image=32, patch=16, vision=(64, 1, 64), text=(64, 1, 1), context=77, vocab=49408, embed=16)


DRESSES = ["bare", "training", "hub, quickgelu", "ours beside", "safetensors", "openai", "flag"]


@pytest.mark.parametrize("dress", DRESSES)
@torch.no_grad()
def test_released_files_are_read_with_the_activation_they_were_trained_with(dress, tmp_path, capsys):
    quick = dress in ("hub, quickgelu", "openai", "flag")
    theirs, _ = reference(CLIP_SHAPE, quick)
    path, state, activation = tmp_path / "weights.pt", theirs.state_dict(), None
    if dress == "training":  # what open_clip's, and DreamLIP's, training saves
        ddp = {"module." + name: value for name, value in state.items()}
        state = {"epoch": 32, "name": "dreamlip", "state_dict": ddp, "optimizer": {"lr": 1e-3}}
    if dress == "hub, quickgelu":
        config = dict(embed_dim=16, quick_gelu=True, vision_cfg=dict(image_size=32, layers=1, width=64, patch_size=16),
                      text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=1))
        (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config)))
    if dress == "ours beside":
        (tmp_path / "weights.json").write_text(json.dumps(to_open_clip(from_state_dict(state))[1]))
    if dress == "openai":
        state = state | {name: torch.tensor(1) for name in ("input_resolution", "context_length", "vocab_size")}
    if dress == "flag":
        activation = "quickgelu"
    if dress == "safetensors":
        from safetensors.torch import save_file
        path = tmp_path / "weights.safetensors"
        save_file({name: value.contiguous() for name, value in state.items()}, path)
    else:
        torch.save(state, path)
    model = Model(path, "cpu", activation=activation)
    assert model.config.activation == ("quickgelu" if quick else "gelu")
    assert f"activation {model.config.activation} (" in capsys.readouterr().out
    said = ["a dog on a sofa", "A house. It is red."]
    assert same(model.texts(said), theirs.encode_text(open_clip.get_tokenizer("ViT-B-32")(said), normalize=True))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    branches, = model.images([(image,) for image in images])
    normal = evaluate.normalize(images)
    assert same(branches[:, 0], theirs.encode_image(normal, normalize=True))


class Unsafe:
    def __reduce__(self):
        return print, ("this ran",)


def test_files_that_are_no_whole_plain_checkpoint_end_in_a_sentence(tmp_path, capsys):
    state = reference(CLIP_SHAPE, False)[0].state_dict()
    torch.save({"state_dict": state, "args": Unsafe()}, tmp_path / "unsafe.pt")
    (tmp_path / "unsafe.pkl").write_bytes(pickle.dumps(Unsafe()))
    torch.save(state, tmp_path / "whole.pt")
    (tmp_path / "half.pt").write_bytes((tmp_path / "whole.pt").read_bytes()[:200_000])
    (tmp_path / "page.pt").write_text("<html>not found</html>")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"settings": {}}, tmp_path / "settings.pt")
    torch.save({k: v for k, v in state.items() if "visual" in k}, tmp_path / "tower.pt")
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "script.pt"))
    (tmp_path / "siglip").mkdir()
    torch.save(state, tmp_path / "siglip/w.pt")
    (tmp_path / "siglip/w.json").write_text(json.dumps(dict(model_cfg={}, preprocess_cfg=dict(mean=[0.5, 0.5, 0.5]))))
    for name, words in (
            ("unsafe.pt", "refused"), ("unsafe.pkl", "not a whole checkpoint"), ("half.pt", "not a whole checkpoint"),
            ("page.pt", "not a whole checkpoint"), ("list.pt", "holds no state dict"), ("script.pt", "TorchScript"),
            ("settings.pt", "holds no state dict"),
            ("tower.pt", "half a checkpoint"), ("gone.pt", "no checkpoint"), ("siglip/w.pt", "by other numbers")):
        with pytest.raises(UserError, match=words) as caught:
            Model(tmp_path / name, "cpu")
        assert "\n" not in str(caught.value) and name in str(caught.value).replace(".json", ".pt")
    assert "this ran" not in capsys.readouterr().out
    with pytest.raises(UserError, match="no held-out data of its own"):
        evaluate.evaluate_run(tmp_path / "whole.pt", device="cpu")


def vocabulary(folder):
    """A vocab.txt with [CLS] 101 and [SEP] 102, as bert-base-uncased's."""
    words = ["[PAD]", *(f"[unused{i}]" for i in range(99)), "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", ",",
             "a", "dog", "##s", "red", "house", "is", "it", "on"]
    (folder / "vocab.txt").write_text("\n".join(words))
    return len(words)


def test_word_pieces_are_berts_with_sentences_parted_and_an_end_of_their_own(tmp_path):
    V = vocabulary(tmp_path)
    ours, theirs = WordPieces(tmp_path / "vocab.txt"), transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    said = ["A red house. It is on dogs", "a dog", "dogs. dogs. unknown", "a " * 30]
    tokens = ours(said, 12)
    for row, text in zip(tokens.tolist(), said):
        ids = theirs("[SEP]".join(text.split(". ")), max_length=12, truncation=True)["input_ids"]
        assert row == [*ids[:-1], V] + [0] * (12 - len(ids)) and ids[-1] == 102
    assert ours.vocab_size == V + 1 and ours.decode([107, 108]) == "dogs"


@torch.no_grad()
def test_a_file_of_lotlips_is_read_with_berts_vocabulary_beside_it(tmp_path):
    size = vocabulary(tmp_path)
    _, bert, proj, state = lotlip(words=size)
    torch.save({"state_dict": {"module." + name: value for name, value in state.items()}}, tmp_path / "model.pt")
    model = Model(tmp_path / "model.pt", "cpu")
    words = WordPieces(tmp_path / "vocab.txt").pieces.encode("a red house[SEP]it is on").ids[1:-1]
    assert model.config.context == 40 - C and model.settings["corner_tokens"] == C
    assert same(model.texts(["A red house. It is on"]), bert_with_corners(bert, proj, words, size)[:, 0])


# ---- there and back: train, export, open_clip, CLIP_benchmark --------------------------------------------------------

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model trained here, exported by the command; scenes of uneven size in class folders and with captions."""
    root = tmp_path_factory.mktemp("exported")
    train.train(dict(method="clip", size="nano", stem="patch", tokenizer="clip", images=640, batch=32, eval_images=0,
                     context=77, workers=0, device="cpu", out=str(root / "run")))
    evaluate.main([str(root / "run"), "--export", "open_clip", str(root / "nano-export.pt")])
    scenes, lines = Scenes("test", 60, 56, 6), []
    for i in range(60):
        scene = scenes.scene(i)
        file = root / "folders" / KINDS[scene.objects[0].kind][0] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.draw(scene)[0]).resize((56 + i % 9, 50)).save(file)
        captions = [scene.captions["raw"], scene.captions["short"], *scene.captions["long"][:i % 3]]
        lines.append(json.dumps(dict(image=str(file.relative_to(root)), caption=captions)))
    (root / "pairs.jsonl").write_text("\n".join(lines))
    open_clip.add_model_config(root / "nano-export.json")
    model, _, prepare = open_clip.create_model_and_transforms("nano-export", pretrained=str(root / "nano-export.pt"))
    return root, model.eval(), prepare, open_clip.get_tokenizer("nano-export"), Model(root / "run", "cpu")


def test_a_model_trained_here_gives_the_same_features_in_open_clip(exported):
    root, theirs, prepare, tokenizer, model = exported
    said = ["a red heart", "The main object is an umbrella. It is blue.", "word " * 200]
    images = [Image.open(path) for path in sorted(root.glob("folders/*/*.png"))[:5]]
    with torch.no_grad():
        assert same(theirs.encode_text(tokenizer(said), normalize=True), model.texts(said))
        found = theirs.encode_image(torch.stack([prepare(image) for image in images]), normalize=True)
    branches, = model.images([(evaluate.preparation(32)(image),) for image in images])
    assert same(found, branches[:, 0])


def test_zero_shot_numbers_are_open_clips_and_clip_benchmarks(exported):
    root, theirs, prepare, tokenizer, model = exported
    dataset = ImageFolder(root / "folders", prepare)
    loader = torch.utils.data.DataLoader(dataset, 16)
    templates = [template.replace("{}", "{c}") for template in evaluate.TEMPLATES]
    found = zeroshot_classification.evaluate(theirs, loader, tokenizer, dataset.classes, templates, "cpu", False)
    ours = evaluate.run_benchmarks(model, [f"imagefolder:{root / 'folders'}"])
    for mine, name in (("top-1", "acc1"), ("top-5", "acc5"), ("mean per class", "mean_per_class_recall")):
        assert ours[f"imagefolder {mine}"][0] / 100 == pytest.approx(found[name], abs=1e-6)
    assert 0 < found["acc1"] < 1


def test_retrieval_numbers_are_open_clips_and_clip_benchmarks(exported):
    root, theirs, prepare, tokenizer, model = exported
    rows = [json.loads(line) for line in (root / "pairs.jsonl").read_text().splitlines()]
    batches = [(torch.stack([prepare(Image.open(root / row["image"])) for row in rows[i:i + 20]]),
                [row["caption"] for row in rows[i:i + 20]]) for i in range(0, 60, 20)]
    found = zeroshot_retrieval.evaluate(theirs, batches, tokenizer, "cpu", False, [1, 5, 10])
    ours = evaluate.run_benchmarks(model, [f"jsonl:{root / 'pairs.jsonl'}"])
    for k in (1, 5, 10):
        for way, name in (("T2I", "image"), ("I2T", "text")):
            assert ours[f"jsonl {way} R@{k}"][0] / 100 == pytest.approx(found[f"{name}_retrieval_recall@{k}"], abs=1e-6)
    assert 0 < ours["jsonl T2I R@10"][0] < 100


def test_what_open_clip_cannot_hold_is_not_exported(tmp_path):
    train.train(dict(method="lotlip", size="nano", images=32, batch=16, eval_images=0, workers=0, device="cpu",
                     out=str(tmp_path / "run")))
    for kind, words in (("open_clip", "linear patches .--stem patch., one branch, no corner"), ("onnx", "open_clip")):
        with pytest.raises(UserError, match=words):
            evaluate.main([str(tmp_path / "run"), "--export", kind, str(tmp_path / "x.pt")])
    assert not (tmp_path / "x.pt").exists()
