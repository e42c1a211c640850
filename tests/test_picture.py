"""What is shown of a picture or searched for, what is exported for transformers, and the zero-shot templates."""

import json
from pathlib import Path
from types import SimpleNamespace

import clip_benchmark.datasets
import open_clip
import pytest
import torch
import torch.nn.functional as F
import transformers
from PIL import Image

import evaluate
from data import UserError, load_tokenizer, normalize
from evaluate import BENCHMARKS, TEMPLATES, TORCHVISION, Model
from model import export_transformers
from test_benchmarks import Grey, lay_out, picture
from test_model import a_run, same, small

VOCAB = 49408  # CLIP's


# ---- for transformers ------------------------------------------------------------------------------------------------

def features(output):
    """transformers from 5.0 on wraps the projected features."""
    return F.normalize(getattr(output, "pooler_output", output), dim=-1)


@pytest.mark.parametrize("activation", ["gelu", "quickgelu"])
@torch.no_grad()
def test_transformers_embeds_pictures_and_texts_alike(activation, tmp_path):
    run, ours = a_run(tmp_path, "clip", activation=activation, vocab=VOCAB)
    there = tmp_path / "there"
    evaluate.main([run, "--export", "transformers", str(there)])
    theirs, report = transformers.CLIPModel.from_pretrained(there, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]

    texts = ["A dog, and <b>the</b> naïve cat!", "it's 10 °C", "too long a text " * 9, "", "🙂 日本"]
    rows = load_tokenizer("clip")(texts, 12)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(there)
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
    for row, ids in zip(rows, tokens["input_ids"]):
        length = int(row.argmax()) + 1
        assert torch.equal(ids[:length], row[:length])
    found = features(theirs.get_text_features(**tokens))
    assert same(found, ours.encode_text(rows)[0][:, 0])

    image = Image.effect_mandelbrot((50, 40), (-2, -1, 1, 1), 30)
    prepared = normalize(Model(run, "cpu").prepare(image)[None])
    processor = transformers.CLIPImageProcessor.from_pretrained(there)
    pixels = processor(image, return_tensors="pt")["pixel_values"]
    assert same(pixels, prepared, 0.05)  # their resizing rounds otherwise
    found = features(theirs.get_image_features(prepared))
    assert same(found, ours.encode_image(prepared)[0][:, 0])


@pytest.mark.parametrize("settings", [
    dict(pool="average"), dict(vision_style="timm"), dict(branches=2), dict(corner_tokens=1), dict(stem="conv")], ids=str)
def test_what_transformers_cannot_hold_is_not_exported(settings, tmp_path):
    with pytest.raises(UserError, match="this model has no place there"):
        export_transformers(small(**settings), tmp_path / "there")
    assert not (tmp_path / "there").exists()


def test_another_tokenizer_is_not_written(tmp_path):
    vocab = load_tokenizer("scenes").vocab_size
    run, _ = a_run(tmp_path, "scenes", vocab=vocab)
    evaluate.main([run, "--export", "transformers", f"{tmp_path}/there"])
    assert f'"eos_token_id": {vocab - 1}' in (tmp_path / "there/config.json").read_text()
    assert not (tmp_path / "there/vocab.json").exists()
    with pytest.raises(UserError, match="--export onnx: take open_clip or transformers"):
        evaluate.main([run, "--export", "onnx", f"{tmp_path}/x"])


# ---- pictures of one's own -------------------------------------------------------------------------------------------

def test_a_pictures_texts_are_scored_and_their_patches_drawn(tmp_path, capsys):
    run, _ = a_run(tmp_path, "clip", vocab=VOCAB)
    picture(tmp_path / "dog.png", 7)
    texts = ["a brown dog", "a red sofa"]
    evaluate.main([run, "--picture", f"{tmp_path}/dog.png", *texts, "--device", "cpu"])
    said = capsys.readouterr().out
    model = Model(run, "cpu")
    cosines = model.texts(texts) @ model.embed([tmp_path / "dog.png"])[0]
    for text, cosine in zip(texts, cosines):
        assert f"{cosine:.3f} {text}" in said
    assert Image.open(tmp_path / "picture.png").width > 500


def test_a_folder_is_searched_and_what_is_unreadable_passed_over(tmp_path, capsys):
    for k in range(12):
        picture(tmp_path / f"pictures/p{k}.png", k)
    (tmp_path / "pictures/broken.png").write_text("x")
    model = Grey()
    model.texts = lambda texts: torch.linspace(1, 0, 40)[None]  # the darker, the more similar
    evaluate.search(model, tmp_path / "pictures", "night", tmp_path, None)
    skipped, *best = capsys.readouterr().out.splitlines()
    assert "skipped: 1, the first: image will not decode: broken" in skipped
    assert [line.split()[1] for line in best] == [f"p{k}" for k in range(12)]
    page = (tmp_path / "search.html").read_text()
    assert "p0" in page
    assert "p11" in page


@pytest.mark.parametrize("flags, words", [
    (["--picture", "gone.png"], "needs texts"),
    (["--picture", "gone.png", "a"], "image missing: .*gone.png"),
    (["--search", "empty", "a"], "empty: no images"),
], ids=str)
def test_what_cannot_be_shown_is_one_sentence(flags, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    run, _ = a_run(tmp_path, "clip", vocab=VOCAB)
    with pytest.raises(UserError, match=words) as caught:
        evaluate.main([run, *flags])
    assert "\n" not in str(caught.value)


# ---- zero-shot templates, ImageNet's relatives, LoTLIP's cut ---------------------------------------------------------

def test_templates_are_open_clips_and_clip_benchmarks():
    assert TEMPLATES["imagenet"] == [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]
    folder = Path(clip_benchmark.datasets.__file__).parent
    theirs = json.loads((folder / "en_zeroshot_classification_templates.json").read_text())
    for name in TORCHVISION:
        other = {"flowers102": "flowers", "aircraft": "fgvc_aircraft"}.get(name, name)
        assert [template.replace("{}", "{c}") for template in TEMPLATES[name]] == theirs[other]


def test_imagenet_v2s_numbers_are_in_numeric_order(tmp_path):
    for number in range(12):
        picture(tmp_path / f"{number}/x.png", number)
    (tmp_path / "classnames.txt").write_text("\n".join(f"thing {number}" for number in range(12)))
    assert BENCHMARKS["imagenet-v2"](Grey(), tmp_path)["top-1"][0] == 100


def test_synsets_want_their_names(tmp_path):
    picture(tmp_path / "n01443537/x.png", 3)
    with pytest.raises(UserError, match="ids of synsets, not names: write .*classnames.txt"):
        BENCHMARKS["imagefolder"](Grey(), tmp_path)
    (tmp_path / "classnames.txt").write_text("thing 3")
    assert BENCHMARKS["imagefolder"](Grey(), tmp_path)["top-1"][0] == 100


@pytest.mark.parametrize("name, said", [
    ("docci", "it is. It's 3. 5 wide"),
    ("jsonl", "it is .. \n It's 3.5 wide.</s>"),
])
def test_captions_are_cut_for_bert_where_lotlip_cuts_them(name, said, tmp_path):
    path = lay_out(name, tmp_path, 1)
    text = "it is .. \n It's 3.5 wide.</s>"
    row = dict(split="test", description=text, image="images/0.png", caption=text)
    path.write_text(json.dumps(row))
    model = Grey()
    BENCHMARKS[name](model, path)
    model.config = SimpleNamespace(image_size=16, text_style="bert")
    BENCHMARKS[name](model, path)
    assert model.said == [text, said]
