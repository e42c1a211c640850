"""Training starts from weights: it begins with their features, what the file lacks begins as copies, and a mistake ends
in one sentence."""

import pytest
import torch
import torch.nn.functional as F

import evaluate
import train
from data import UserError
from model import export_open_clip, load_model, stretched, write_whole
from test_checkpoints import SHAPE, lotlip, vocabulary
from test_model import pictures, reference, same, small, texts
from test_train import RUN, fit


def started(**flags):
    """The model that a run with these flags starts with, its tokenizer being the file's."""
    flags = {**RUN, "method": "clip", "raw_caption": True, "long_texts": 1, **flags}
    told, weights = train.start_of(train.resolve(flags), flags)
    s = train.resolve(flags, 1, told)
    s.vocab = len(weights["text.token_embedding.weight"])
    return train.build(s, weights).eval()


def released(folder, **shape):
    """A file in open_clip's layout with random weights."""
    theirs, _ = reference({**SHAPE, **shape})
    torch.save(theirs.state_dict(), folder / "released.pt")
    return str(folder / "released.pt")


def a_run(folder, **settings):
    """The folder of a run of ours with random weights."""
    model = small(**settings)
    known = vars(model.config) | dict(method="clip", tokenizer="scenes")
    assert write_whole(folder / "checkpoint.pt", dict(settings=known, model=model.state_dict(), step=1))
    return str(folder)


def features(model, images, tokens):
    """Of the first branch and the end-of-text token."""
    return torch.cat([model.encode_image(images)[0][:, 0], model.encode_text(tokens)[0][:, 0]])


# ---- both towers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("corners", [0, 2])
@pytest.mark.parametrize("source", ["open_clip", "run", "conv stem"])
@torch.no_grad()
def test_a_run_starts_with_the_features_of_its_file_also_beside_corners(source, corners, tmp_path):
    if source == "open_clip":
        path, inputs = released(tmp_path), (pictures(2, 32), texts(3, 9, 20, vocab=300, width=20))
    else:
        kinds = dict(stem="conv", pool="average") if source == "conv stem" else dict(activation="quickgelu")
        path, inputs = a_run(tmp_path, **kinds), (pictures(2), texts(3, 9, 12))
    expected = load_model(tmp_path / "released.pt" if source == "open_clip" else tmp_path)[0].eval()
    model = started(init=path, corner_tokens=corners)
    assert same(features(model, *inputs), features(expected, *inputs))
    assert model.config.context == expected.config.context  # not the size's


@pytest.mark.parametrize("kind", ["class", "mlp"])
@torch.no_grad()
def test_branches_begin_near_the_one_there_is_and_apart(kind, tmp_path):
    path, images = released(tmp_path), pictures(4, 32)
    expected = load_model(tmp_path / "released.pt")[0].encode_image(images)[0][:, 0]
    branches = started(init=path, branches=3, branch_type=kind, branch_layers=2).encode_image(images)[0]
    assert (F.cosine_similarity(branches.mean(1), expected) > 0.99).all()
    assert not same(branches[:, 0], branches[:, 1]) and not same(branches[:, 1], branches[:, 2])
    if kind == "mlp":
        assert same(branches[:, 0], expected)


def test_of_more_branches_than_wanted_the_first_stay(tmp_path):
    path = a_run(tmp_path, branches=4)
    before = small(branches=4).visual.class_embedding
    assert torch.equal(started(init=path, branches=2).visual.class_embedding, before[:2])
    assert torch.equal(started(init=path).visual.class_embedding, before)


@torch.no_grad()
def test_a_stretched_model_reads_short_texts_as_before(tmp_path):
    model = started(init=released(tmp_path, context=77), context=248)
    before = load_model(tmp_path / "released.pt")[0].eval()
    short = texts(3, 9, 20, vocab=300, width=77)
    assert model.config.context == 248 and same(model.encode_text(short)[0], before.encode_text(short)[0])


def test_positions_are_stretched_as_long_clip_does():
    """The loop of Long-CLIP's code, from 77 positions to 248: 20 stay, each further one becomes four."""
    old = torch.randn(77, 8)
    expected = list(old[:20])
    for i in range(20, 77):
        step = old[i] - old[i - 1] if i == 76 else old[i + 1] - old[i]
        expected += [old[i] + step * quarter / 4 for quarter in range(4)]
    assert same(stretched(old, 248), torch.stack(expected))
    assert torch.equal(stretched(old, 30), old[:30])
    assert torch.equal(stretched(old[:12], 40)[:10], old[:10])


@torch.no_grad()
def test_a_run_goes_on_from_its_export_at_its_held_out_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "evaluate_run", lambda folder: None)
    flags = dict(tokenizer="clip", eval_images=64, eval_steps=2)
    with torch.enable_grad():
        _, lines = fit(tmp_path / "run", stem="patch", context=77, **flags)
    trained = load_model(tmp_path / "run")[0]
    export_open_clip(trained, tmp_path / "exported.pt")
    run = train.open_run({**RUN, **flags, "init": str(tmp_path / "exported.pt")}, writes=False)
    assert (run.s.context, run.s.stem, run.s.pool) == (77, "patch", trained.config.pool)
    assert train.held_out_loss(run) == pytest.approx(lines[-1]["held_out_loss"], rel=1e-5)


def test_what_no_shape_tells_is_the_users_to_say(tmp_path):
    config = started(init=released(tmp_path), activation="quickgelu", pool="average", text_heads=2).config
    assert (config.activation, config.pool, config.text_heads) == ("quickgelu", "average", 2)


# ---- one tower -------------------------------------------------------------------------------------------------------


def two_towers(folder, older=False):
    """Files of timm's ViT and of BERT, random weights, as they are downloaded -> flags, the two modules."""
    vit, bert, _, _ = lotlip(words=vocabulary(folder) - 2)
    torch.save(vit.state_dict() | {"head.weight": torch.zeros(3, 128)}, folder / "vit.pt")
    state = {"bert." + name: value for name, value in bert.state_dict().items()}
    if older:
        names = [name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta") for name in state]
        state = dict(zip(names, state.values()))
    extra = {"cls.predictions.bias": torch.zeros(3), "bert.embeddings.position_ids": torch.arange(40)[None]}
    torch.save(state | extra, folder / "bert.pt")
    return dict(init_image=str(folder / "vit.pt"), init_text=str(folder / "bert.pt")), vit, bert


@pytest.mark.parametrize("older", [False, True])
@torch.no_grad()
def test_timms_vit_and_bert_fill_the_towers_together_or_alone(older, tmp_path):
    flags, vit, bert = two_towers(tmp_path, older)
    model = started(**flags)
    images = pictures(2, 32)
    assert same(model.encode_image(images)[0][:, 0], F.normalize(vit(images), dim=-1))
    words = [101, 5, 9, 104]
    expected = bert(torch.tensor([[*words, 102]])).pooler_output @ model.text.proj
    tokens = torch.tensor([[*words, model.config.vocab - 1, 0]])  # the last [SEP] is the vocabulary's last
    assert same(model.encode_text(tokens)[0][:, 0], F.normalize(expected, dim=-1))
    alone = started(init_text=flags["init_text"], embed=24)
    assert alone.config.vision_style == "clip" and alone.text.proj.shape == (128, 24)
    assert torch.equal(alone.text.blocks[1].fc.weight, model.text.blocks[1].fc.weight)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_locked_image_tower_keeps_its_bits_and_a_resumed_run_needs_no_file(accumulate, tmp_path):
    files, _, _ = two_towers(tmp_path)
    start = started(**files, corner_tokens=2).state_dict()
    flags = dict(method="lotlip", context=32, images=32, lock_image=True, accumulate=accumulate)
    checkpoint, lines = fit(tmp_path / "run", **flags, **files)
    assert len(lines) == 2 and checkpoint["settings"]["tokenizer"] == str(tmp_path / "vocab.txt")
    for name, value in checkpoint["model"].items():
        if name.startswith("visual."):
            assert torch.equal(value, start[name]), name
        elif name.startswith("text.blocks"):
            assert not torch.equal(value, start[name]), name
    assert len(checkpoint["optimizer"]["state"]) == sum(not name.startswith("visual.") for name in start)
    for path in files.values():
        (tmp_path / path).unlink()
    again, _ = fit(tmp_path / "run", resume=str(tmp_path / "run"), **flags, **files)
    assert again["settings"]["init_image"] == files["init_image"]
    assert all(torch.equal(value, checkpoint["model"][name]) for name, value in again["model"].items())


# ---- mistakes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags, words",
    [
        (dict(init="run", patch=8), "--patch 8 contradicts .*run, whose weights have 4: leave it away"),
        (dict(init="run", vision_width=768), "--vision-width 768 contradicts .* have 16"),
        (dict(init="run", image_size=18), "image size 18 is not a multiple"),
        (dict(init_image="vit.pt", embed=24), "--embed 24 contradicts .*vit.pt, whose weights have 128"),
        (dict(init_text="bert.pt", text_style="clip"), "--text-style clip contradicts .* have bert"),
        (dict(init="nothing.pt"), "nothing.pt does not exist"),
        (dict(init="vit.pt"), "vit.pt: not the state dict of"),
        (dict(init_image="bert.pt"), "bert.pt is no file for --init-image"),
        (dict(init_image="half.pt", init_text="bert.pt"), "not whole: they have no visual.blocks.1.attn.qkv.bias"),
        (dict(init_text="run/checkpoint.pt"), "checkpoint.pt is no file for --init-text"),
        (dict(init="run", init_text="bert.pt"), "--init brings both towers"),
        (dict(lock_image=True), "--lock-image keeps an image tower"),
    ],
    ids=str,
)
def test_a_mistake_ends_in_one_sentence(flags, words, tmp_path):
    (tmp_path / "run").mkdir()
    a_run(tmp_path / "run")
    two_towers(tmp_path)
    half = torch.load(tmp_path / "vit.pt")
    del half["blocks.1.attn.qkv.bias"]
    torch.save(half, tmp_path / "half.pt")
    for name in ("init", "init_image", "init_text"):
        if name in flags:
            flags = flags | {name: str(tmp_path / flags[name])}
    with pytest.raises(UserError, match=words) as caught:
        started(**flags)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_of_another_size_is_refused(tmp_path):
    with pytest.raises(UserError, match="--tokenizer scenes is not that of the weights .* 40 tokens"):
        fit(tmp_path / "out", init=a_run(tmp_path))
