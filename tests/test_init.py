"""Training starts from weights: it begins with their features, what the file lacks begins as copies, and a mistake ends
in one sentence."""

import pytest
import torch
import torch.nn.functional as F

import train
from data import UserError
from model import load_model, stretched
from test_checkpoints import lotlip, vocabulary
from test_model import a_run, pictures, reference, same, texts
from test_train import RUN, fit


def started(**flags):
    """The model that a run with these flags starts with, its tokenizer being the file's."""
    flags = {**RUN, "method": "clip", "raw_caption": True, "long_texts": 1, **flags}
    told, weights = train.load_initial_weights(train.resolve(flags), flags)
    s = train.resolve(flags, 1, told)
    s.vocab = len(weights["text.token_embedding.weight"])
    return train.build(s, weights).eval()


def released(folder, **shape):
    """A file in open_clip's layout with random weights, and what it holds for us."""
    path = folder / "released.pt"
    torch.save(reference(**shape).state_dict(), path)
    return str(path), load_model(path)[0].eval()


# ---- both towers -----------------------------------------------------------------------------------------------------

OTHER = dict(image_size=32, context=20, vocab=300, stem="conv", pool="average", activation="quickgelu")


@pytest.mark.parametrize("source", ["open_clip", "run"])
@torch.no_grad()
def test_a_run_starts_with_the_features_of_its_file_beside_new_corners(source, tmp_path):
    if source == "open_clip":
        path, expected = released(tmp_path)
    else:
        path, expected = a_run(tmp_path, **OTHER)
    model = started(init=path, corner_tokens=2)
    images = pictures(2, 32)
    tokens = texts(3, 9, 20, vocab=300, width=20)
    assert model.config.context == 20  # not the size's
    assert same(model.encode_image(images)[0], expected.encode_image(images)[0])
    assert same(model.encode_text(tokens)[0][:, 0], expected.encode_text(tokens)[0][:, 0])


@pytest.mark.parametrize("kind", ["class", "mlp"])
@torch.no_grad()
def test_branches_begin_near_the_one_there_is_and_apart(kind, tmp_path):
    path, before = released(tmp_path)
    model = started(init=path, branches=3, branch_type=kind, branch_layers=2)
    images = pictures(4, 32)
    expected = before.encode_image(images)[0][:, 0]
    branches = model.encode_image(images)[0]
    assert (F.cosine_similarity(branches.mean(1), expected) > 0.99).all()
    assert not same(branches[:, 0], branches[:, 1])
    assert not same(branches[:, 1], branches[:, 2])
    if kind == "mlp":
        assert same(branches[:, 0], expected)


@torch.no_grad()
def test_a_stretched_model_reads_short_texts_as_before(tmp_path):
    path, before = released(tmp_path, context=77)
    model = started(init=path, context=248)
    short = texts(3, 9, 20, vocab=300, width=77)
    assert model.config.context == 248
    assert same(model.encode_text(short)[0], before.encode_text(short)[0])


def test_positions_are_stretched_as_long_clip_does():
    """The loop of Long-CLIP's code, from 77 positions to 248: 20 stay, each further one becomes four."""
    old = torch.randn(77, 8)
    expected = list(old[:20])
    for i in range(20, 77):
        left = min(i, 75)
        step = old[left + 1] - old[left]  # behind the last one as before it
        for quarter in range(4):
            expected.append(old[i] + step * quarter / 4)
    assert same(stretched(old, 248), torch.stack(expected))
    assert torch.equal(stretched(old, 30), old[:30])


def test_what_no_shape_tells_is_the_users_to_say(tmp_path):
    path, _ = released(tmp_path)
    config = started(init=path, activation="quickgelu", pool="average", text_heads=4).config
    assert (config.activation, config.pool, config.text_heads) == ("quickgelu", "average", 4)


# ---- one tower -------------------------------------------------------------------------------------------------------


def two_towers(folder):
    """Files of timm's ViT and of BERT, random weights, as they are downloaded -> flags, the two modules."""
    vit, bert, _, _ = lotlip(words=vocabulary(folder) - 2)
    torch.save(vit.state_dict() | {"head.weight": torch.zeros(3, 128)}, folder / "vit.pt")
    state = {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(40)[None]}
    for name, value in bert.state_dict().items():
        name = name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        state["bert." + name] = value
    torch.save(state, folder / "bert.pt")
    files = dict(init_image=str(folder / "vit.pt"), init_text=str(folder / "bert.pt"))
    return files, vit, bert


@torch.no_grad()
def test_timms_vit_and_bert_fill_the_towers_together_or_alone(tmp_path):
    flags, vit, bert = two_towers(tmp_path)
    model = started(**flags)
    images = pictures(2, 32)
    assert same(model.encode_image(images)[0][:, 0], F.normalize(vit(images), dim=-1))
    words = [101, 5, 9, 104]
    pooled = bert(torch.tensor([[*words, 102]])).pooler_output
    tokens = torch.tensor([[*words, model.config.vocab - 1, 0]])  # the last [SEP] is the vocabulary's last
    assert same(model.encode_text(tokens)[0][:, 0], F.normalize(pooled @ model.text.proj, dim=-1))
    alone = started(init_text=flags["init_text"], embed=24)
    assert alone.config.vision_style == "clip"
    assert alone.text.proj.shape == (128, 24)
    assert torch.equal(alone.text.blocks[1].fc.weight, model.text.blocks[1].fc.weight)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_locked_image_tower_keeps_its_bits_and_a_resumed_run_needs_no_file(accumulate, tmp_path):
    files, _, _ = two_towers(tmp_path)
    start = started(**files, corner_tokens=2).state_dict()
    flags = dict(method="lotlip", context=32, images=32, lock_image=True, accumulate=accumulate, **files)
    checkpoint, _ = fit(tmp_path / "run", **flags)
    assert checkpoint["settings"]["tokenizer"] == str(tmp_path / "vocab.txt")
    for name, value in checkpoint["model"].items():
        if name.startswith("visual."):
            assert torch.equal(value, start[name]), name
        elif name.startswith("text.blocks"):
            assert not torch.equal(value, start[name]), name
    (tmp_path / "vit.pt").unlink()
    (tmp_path / "bert.pt").unlink()
    again, _ = fit(tmp_path / "run", resume=str(tmp_path / "run"), **flags)
    for name, value in again["model"].items():
        assert torch.equal(value, checkpoint["model"][name])


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flags, words", [
    (dict(init="run", patch=8), "--patch 8 contradicts .*run, whose weights have 4: drop the flag"),
    (dict(init_image="vit.pt", embed=24), "--embed 24 contradicts .*vit.pt, whose weights have 128"),
    (dict(init="nothing.pt"), "nothing.pt does not exist"),
    (dict(init="vit.pt"), "vit.pt: not the state dict of"),
    (dict(init_image="bert.pt"), "bert.pt is no file for --init-image"),
    (dict(init_image="half.pt", init_text="bert.pt"), "not whole: they have no visual.blocks.1.attn.qkv.bias"),
    (dict(init="run", init_text="bert.pt"), "--init brings both towers"),
    (dict(lock_image=True), "--lock-image keeps an image tower"),
    (dict(init="run", lock_image=True, branches=3), "--lock-image keeps the image tower"),
    (dict(context=2), "--context 2 leaves no room for a word"),
], ids=str)
def test_a_mistake_ends_in_one_sentence(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    a_run(tmp_path / "run")
    two_towers(tmp_path)
    half = torch.load("vit.pt")
    del half["blocks.1.attn.qkv.bias"]
    torch.save(half, "half.pt")
    with pytest.raises(UserError, match=words) as caught:
        started(**flags)
    assert "\n" not in str(caught.value)


def test_weights_of_another_width_want_the_size_of_their_recipe(tmp_path):
    a_run(tmp_path)
    flags = dict(init=str(tmp_path))
    with pytest.raises(UserError, match="not those of --size tiny, .*give --size base-16"):
        train.load_initial_weights(train.resolve(dict(flags, device="cpu")), flags)


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    path, _ = a_run(tmp_path)
    with pytest.raises(UserError, match="--tokenizer scenes is not that of the weights .* 40 tokens"):
        fit(tmp_path / "out", init=path)
