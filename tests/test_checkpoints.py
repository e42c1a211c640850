"""Checkpoints travel: other people's weights give here what their own modules give, ours give there what they give
here, and CLIP_benchmark scores them alike."""

import json
import re
from types import SimpleNamespace

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
from data import UserError, WordPieces, normalize
from evaluate import Model
from model import from_state_dict, load_model, resized
from scenes import Scenes
from test_benchmarks import write
from test_model import pictures, reference, same, shaken, small, texts
from test_train import fit

# ---- open_clip's layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 40])
@torch.no_grad()
def test_at_another_resolution_positions_are_interpolated_as_by_open_clip(size):
    state = reference().state_dict()
    ours = resized(from_state_dict(state), size)
    theirs = reference(image=size)
    open_clip.model.resize_pos_embed(state, theirs)
    theirs.load_state_dict(state)
    images = pictures(2, size)
    assert same(ours.encode_image(images)[0][:, 0], theirs.encode_image(images, normalize=True))


def export_open_clip(model, file):
    model = SimpleNamespace(clip=model, tokenizer=SimpleNamespace(name="clip"))
    evaluate.export(model, "open_clip", file)


@pytest.mark.parametrize("settings", [dict(pool="average"), dict(activation="quickgelu")], ids=str)
@torch.no_grad()
def test_what_is_exported_open_clip_loads_strictly_and_embeds_alike(settings, tmp_path):
    ours = small(**settings)
    export_open_clip(ours, tmp_path / "exported.pt")
    open_clip.add_model_config(tmp_path / "exported.json")
    theirs = open_clip.create_model("exported", pretrained=str(tmp_path / "exported.pt")).eval()
    images = pictures()
    tokens = texts(6, 12, 3)
    assert same(theirs.encode_image(images, normalize=True), ours.encode_image(images)[0][:, 0])
    assert same(theirs.encode_text(tokens, normalize=True), ours.encode_text(tokens)[0][:, 0])
    back, _ = load_model(tmp_path / "exported.pt")
    assert back.config == ours.config
    assert all(map(torch.equal, back.parameters(), ours.parameters()))


# ---- Holistic CLIP's layouts: open_clip's modules, with H class tokens or H parallel MLPs ----------------------------


@pytest.mark.parametrize("blind", [False, True])
@torch.no_grad()
def test_several_class_tokens_with_a_position_each_are_holistic_clips(blind):
    """Blind to one another (2412.00440, section 3.2), or as the release computes it: the mask is an addend of 1."""
    H = 3
    theirs = reference()
    images = pictures(2, 32)
    v = theirs.visual
    v.class_embedding = torch.nn.Parameter(torch.randn(H, 128))
    v.positional_embedding = torch.nn.Parameter(torch.randn(H + 16, 128))
    patches = v.conv1(images).flatten(2).mT
    x = torch.cat([v.class_embedding.expand(2, -1, -1), patches], 1)
    x = x + v.positional_embedding
    added = torch.zeros(H + 16, H + 16)
    added[:H, :H] = (1 - torch.eye(H)) * (-1e9 if blind else 1)
    x = v.transformer(v.ln_pre(x), attn_mask=added)
    expected = F.normalize(v.ln_post(x) @ v.proj, dim=-1)

    ours = from_state_dict(theirs.state_dict(), branch_mask=blind).eval()
    assert same(torch.cat(ours.encode_image(images), 1), expected)
    assert not from_state_dict(theirs.state_dict()).config.branch_mask


@pytest.mark.parametrize("pool", ["class", "average"])
@torch.no_grad()
def test_parallel_mlps_are_holistic_clips(pool):
    """Their names: the shared first layer is mlp.c_fc, the H second ones c_proj.0 to c_proj.H-1, in the last layers."""
    theirs = reference()
    state = theirs.state_dict()
    images = pictures(2, 32)
    v = theirs.visual
    v.output_tokens = True
    branches, patches = [], []
    for h in range(3):
        summary, cells = v(images)  # a branch alone is open_clip's ViT
        patches.append(cells @ v.proj)
        branches.append(summary if pool == "class" else patches[h].mean(1))
        for layer in (1, 2):
            block = f"visual.transformer.resblocks.{layer}"
            for what, value in v.transformer.resblocks[layer].mlp.c_proj.named_parameters():
                state[f"{block}.c_proj.{h}.{what}"] = value.clone()
                state.pop(f"{block}.mlp.c_proj.{what}", None)
                value.add_(0.1 * torch.randn_like(value))  # a constant would vanish in the next LayerNorm
    ours = from_state_dict(state, pool=pool).eval()
    assert ours.config.branch_layers == 2
    found = ours.encode_image(images)
    assert same(found[0], F.normalize(torch.stack(branches, 1), dim=-1))
    assert same(found[1], F.normalize(sum(patches), dim=-1))  # the direction of their mean


# ---- LoTLIP's layout: timm's ViT and transformers' BERT with corner tokens -------------------------------------------

C = 2  # corner tokens


def lotlip(words):
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2)
    vit = timm.create_model("vit_base_patch16_224.augreg_in21k", num_classes=0, **shape)
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
    state = {"text.proj.weight": proj, "logit_scale": torch.tensor(2.0)}
    for prefix, module in (("visual.trunk.", vit), ("text.transformer.", bert)):
        for name, value in module.state_dict().items():
            state[prefix + name] = value
    return vit, bert, proj, state


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
    embedded = bert.embeddings(input_ids=ids)
    hidden = bert.encoder(embedded, attention_mask=mask)[0]
    pooled = bert.pooler.activation(bert.pooler.dense(hidden[:, : 1 + C]))
    return F.normalize(pooled @ proj.T, dim=-1)


def vocabulary(folder):
    """A vocab.txt with [CLS] 101 and [SEP] 102, as bert-base-uncased's -> how many words it has."""
    unused = [f"[unused{i}]" for i in range(99)]
    words = ["[PAD]", *unused, "[UNK]", "[CLS]", "[SEP]", "[MASK]", *". , a dog ##s red house is it on".split()]
    (folder / "vocab.txt").write_text("\n".join(words))
    return len(words)


def test_word_pieces_are_berts_with_sentences_parted_and_an_own_end(tmp_path):
    size = vocabulary(tmp_path)
    ours = WordPieces(tmp_path / "vocab.txt")
    theirs = transformers.BertTokenizer(str(tmp_path / "vocab.txt"))
    for text in ("A red house. It is on dogs", "a dog", "dogs. dogs. unknown", "a " * 30):
        parted = text.replace(". ", "[SEP]")
        ids = theirs(parted, max_length=12, truncation=True)["input_ids"]
        padding = [0] * (12 - len(ids))
        assert ours([text], 12).tolist() == [[*ids[:-1], size, *padding]]


@torch.no_grad()
def test_lotlips_release_is_timms_vit_and_berts_text_tower_with_corners(tmp_path):
    size = vocabulary(tmp_path)
    vit, bert, proj, state = lotlip(words=size)
    ddp = {"module." + name: value for name, value in state.items()}
    torch.save({"epoch": 32, "state_dict": ddp, "optimizer": {"lr": 1e-3}}, tmp_path / "model.pt")
    model = Model(tmp_path / "model.pt", "cpu")
    assert model.config.context == 40 - C

    images = pictures(3, 32)
    branches, patches = model.clip.encode_image(images)
    assert same(branches[:, 0], F.normalize(vit(images), dim=-1))
    cells = vit.forward_features(images)[:, 1:]
    assert same(patches, F.normalize(cells, dim=-1))

    for words in ([5, 9, 110], [7], [102, 33, 102, 4, 8, 60, 61, 62]):  # [SEP] between sentences, too
        tokens = torch.tensor([[101, *words, size, 0, 0]])  # the last [SEP] is the vocabulary's last
        found, _ = model.clip.encode_text(tokens)
        assert same(found, bert_with_corners(bert, proj, words, size))
    words = WordPieces(tmp_path / "vocab.txt").pieces.encode("a red house[SEP]it is on").ids[1:-1]
    expected = bert_with_corners(bert, proj, words, size)
    assert same(model.texts(["A red house. It is on"]), expected[:, 0])


# ---- files: what a checkpoint file may be, and what it may not -------------------------------------------------------


@pytest.mark.parametrize("dress", ["custom text", "hub", "safetensors", "openai"])
@torch.no_grad()
def test_a_released_file_is_read_with_the_activation_of_its_training(dress, tmp_path, capsys):
    quick = dress in ("hub", "openai")
    theirs = reference(quick, context=77, vocab=49408)
    state = theirs.state_dict()
    path = tmp_path / "weights.pt"
    if dress == "custom text":
        state = {re.sub("^(?!visual|logit_scale)", "text.", name): value for name, value in state.items()}
    if dress == "hub":
        config = dict(quick_gelu=True, vision_cfg=dict(width=128), text_cfg=dict(width=128, heads=2))
        (tmp_path / "open_clip_config.json").write_text(json.dumps(dict(model_cfg=config)))
    if dress == "safetensors":
        (tmp_path / "weights.json").write_text('{"lr": 1}')  # no config of a model
    if dress == "openai":  # three numbers beside the weights: by them the activation is known
        state |= dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(1))
    if dress == "safetensors":
        path = tmp_path / "weights.safetensors"
        save_file(state, path)
    else:
        torch.save(state, path)
    model = Model(path, "cpu")
    assert f"activation {'quickgelu' if quick else 'gelu'} (" in capsys.readouterr().out
    said = ["a dog on a sofa", "A house. It is red."]
    tokens = open_clip.get_tokenizer("ViT-B-32")(said)
    assert same(model.texts(said), theirs.encode_text(tokens, normalize=True))
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    branches, _ = model.encode([image])
    assert same(branches[:, 0], theirs.encode_image(normalize(image[None]), normalize=True))


class Unsafe:
    def __reduce__(self):
        return print, ("this ran",)


def test_files_that_are_no_plain_checkpoint_end_in_a_sentence(tmp_path, capsys):
    state = reference().state_dict()
    contents = {
        "is refused": dict(state_dict=state, args=Unsafe()),
        "or another architecture": state | {"visual.attn_pool.query": torch.zeros(1)},
        "not the state dict of an open_clip ViT": {"visual.layer1.0.conv1.weight": torch.zeros(1)},
    }
    path = tmp_path / "weights.pt"
    for reason, content in contents.items():
        torch.save(content, path)
        with pytest.raises(UserError, match=f"weights.pt.*{reason}"):
            load_model(path)
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))
    with pytest.raises(UserError, match="weights.pt.*TorchScript"):
        load_model(path)
    assert "this ran" not in capsys.readouterr().out


# ---- there and back: train, export, open_clip, CLIP_benchmark --------------------------------------------------------


def test_a_model_trained_here_scores_in_open_clip_as_clip_benchmark_says(tmp_path):
    """The command exports it; the scenes are of uneven size, and some captions longer than the context."""
    run, weights = tmp_path / "run", tmp_path / "nano-export.pt"
    fit(run, method="clip", stem="patch", tokenizer="clip", context=77, images=640, batch=32)
    evaluate.main([str(run), "--export", "open_clip", str(weights)])
    open_clip.add_model_config(tmp_path / "nano-export.json")
    theirs, _, prepare = open_clip.create_model_and_transforms("nano-export", pretrained=str(weights))
    scenes = Scenes("test", 60, 56, 6)
    rows, images, said = [], [], []
    for i in range(60):
        scene = scenes.scene(i)
        pixels, _ = scenes.draw(scene)
        path = tmp_path / f"{i}.png"
        Image.fromarray(pixels).resize((56 + i % 9, 50)).save(path)
        words = scene.captions
        captions = [words["raw"] + " word" * i, words["short"], *words["long"][: i % 3]]
        rows.append(dict(image=path.name, caption=captions))
        images.append(prepare(Image.open(path)))
        said.append(captions)
    write(tmp_path / "pairs.jsonl", rows)

    batch = torch.stack(images), said
    tokenizer = open_clip.get_tokenizer("nano-export")
    expected = zeroshot_retrieval.evaluate(theirs.eval(), [batch], tokenizer, "cpu", False, [1, 5, 10])
    found = evaluate.run_benchmarks(Model(run, "cpu"), [f"jsonl:{tmp_path}/pairs.jsonl"])
    for k in (1, 5, 10):
        for way, name in (("T2I", "image"), ("I2T", "text")):
            recall = expected[f"{name}_retrieval_recall@{k}"]
            value, _ = found[f"jsonl {way} R@{k}"]
            assert value / 100 == pytest.approx(recall, abs=1e-6)
    assert 0 < found["jsonl T2I R@10"][0] < 100
