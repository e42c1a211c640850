"""Captions become CLIP's ids exactly, sentences are cut where they end, any picture becomes RGB or is refused with a
reason, captions are found in every published layout, each method draws its own texts, and a box follows its crop."""
import gzip
import io
import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import chain, permutations

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from open_clip.tokenizer import SimpleTokenizer
from PIL import Image
from torch.nn.functional import max_pool2d

import data
import train
from data import (BadSample, Captions, Sentence, TrainingSamples, UserError, boxes_to_patches, collate, crop_box,
                  draw_texts, load_image, load_tokenizer, open_dataset, read_captions, read_fields, split_sentences)

# ---- CLIP's tokenizer ------------------------------------------------------------------------------------------------

reference = SimpleTokenizer()
clip = load_tokenizer("clip")
scenes = load_tokenizer("scenes")

ODD = ["", " ", "\n\t ", "a", "!", "A photo of a dog.",
       "it's we're I'VE they'd I'm you'll don't o'clock 'S", "'''", "!!!???...",
       "3.5 x 1,000 = 3500", "½ ² Ⅷ ① ٣ ४ 一二三", "café naïve Ångström STRASSE straße ŒUVRE",
       "İstanbul ıI ǅ", "it'ſ a ſtart K Å",
       "日本語の文章です。", "你好，世界！", "한국어 조선말", "العربية שָׁלוֹם", "हिन्दी தமிழ் ไทย ខ្មែរ",
       "e\u0301 vs \u00e9 a\u0308\u0323", "👍🏽 👨‍👩‍👧‍👦 🇩🇪 ❤️ ☃",
       "a\u200bb \ufeffc \u00add\u2060e", "a\xa0b\u3000c\u2003d\u2028e\x85f\x1cg\x1fh",
       "ﬁne ﬂag ＦＵＬＬ ｗｉｄｔｈ ｶﾅ", "“curly” ‘quotes’ – — … «» ‹›",
       "schÃ¶n â€œmojibakeâ€\x9d cafÃ©",
       "&lt;b&gt; &amp;amp; &quot;x&quot; &eacute; &#233; &#x1F600; &notanentity; &",
       "&amp;lt;p&amp;gt; &#xD800; &#0;", "<i> &amp;eacute; &amp;amp;amp;",
       "<start_of_text> a <end_of_text> b<END_OF_TEXT>c !!<end_of_text>",
       "<|startoftext|> <|endoftext|> </w> a</w>b", "<ſtart_of_text>",
       "x" * 5000, "ab" * 3000, "é" * 2000, "a b " * 1000, "\x00\x01\x1b[31mred\x7f",
       "a\r\nb\rc", "\ud800 lone \udfff surrogate",
       "\U0010ffff \ue000 \U000e0001 \u0378 \U0001df00", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟘𝟙𝟚",
       "http://example.com/a_b?c=d&e=f#g", "snake_case __dunder__ a-b"]

SCRAPS = ("&amp; &lt; &#39; &#x 's 'LL ’t <end_of_text> <start_of_text> </w> é e\u0301 Ã© 日 ☂ 👍 3.5 ½ ... _ DOG "
          "umbrellas \u200d ſ ; &").split() + [" ", "\n", "\xa0"]


def examples(n):
    return hypothesis.settings(max_examples=n, deadline=None, database=None)


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_text_gets_open_clips_ids(text):
    assert clip.encode(text) == reference.encode(text)


@pytest.mark.parametrize("length", [2, 3, 5, 77, 300])
def test_a_batch_of_any_length_is_open_clips(length):
    assert torch.equal(clip(ODD, length), reference(ODD, length))


@examples(2500)
@given(st.text(max_size=120) | st.lists(st.sampled_from(SCRAPS) | st.text("abcdeinorst", max_size=8)).map("".join))
def test_any_unicode_text_and_markup_run_together_get_open_clips_ids(text):
    assert clip.encode(text) == reference.encode(text)


def test_every_word_of_clips_vocabulary_gets_open_clips_ids():
    words = [reference.decode([number]) for number in range(reference.vocab_size - 2)]
    for start in range(0, len(words), 25):
        text = " ".join(words[start:start + 25])
        assert clip.encode(text) == reference.encode(text)


def decoded(tokenizer, row):
    """The words between a row's start and its end."""
    ids = row.tolist()
    return tokenizer.encoding.decode(ids[1:ids.index(tokenizer.eot)]).rstrip()


@examples(200)
@given(st.text("abc DEF é日 Ω 👍 .,!?'0189 -\n", max_size=60))
def test_scenes_tokens_hold_all_of_a_text_but_its_case_and_spaces(text):
    found = decoded(scenes, scenes([text], 300)[0])
    assert "".join(found.split()) == "".join(text.lower().split())


def test_without_ftfy_only_garbled_text_differs_and_it_is_said(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ftfy", None)  # makes the import fail
    bare = load_tokenizer("clip")
    assert "pip install ftfy" in capsys.readouterr().out
    assert bare.encode("a caf\u00e9 &amp; a dog") == clip.encode("a caf\u00e9 &amp; a dog")
    assert bare.encode("cafÃ©") != clip.encode("cafÃ©") == clip.encode("café")


def test_auto_takes_the_scenes_vocabulary_where_clips_is_not_installed_and_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert load_tokenizer("auto").name == "scenes"
    assert re.search("scenes instead of clip.*pip install open_clip_torch", capsys.readouterr().out)


def test_a_vocabulary_is_read_from_a_file_of_clips_kind_or_of_tiktokens():
    for path, named in ((data.find_clip_vocabulary(), clip), (data.SCENES_VOCABULARY, scenes)):
        assert load_tokenizer(path).encode("A red umbrella.") == named.encode("A red umbrella.")


@pytest.mark.parametrize("name, content, says", [
    ("clop", b"", "auto, clip, scenes"),
    ("bad.txt.gz", b"not gzip", "not a vocabulary"),
    ("cut.txt.gz", gzip.compress(b"v\na b\n" * 99)[:-12], "not a vocabulary"),
    ("bad.tiktoken", b"\x00\x01\n", "not a vocabulary")])
def test_a_wrong_tokenizer_is_one_sentence(tmp_path, monkeypatch, name, content, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}.*{says}") as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


# ---- sentences -------------------------------------------------------------------------------------------------------

CUTS = r"""
A dog runs. A cat sits. | A dog runs. / A cat sits.
a dog runs. a cat sits | a dog runs. / a cat sits
It is 3.5 m tall. It costs $1,000.50. | It is 3.5 m tall. / It costs $1,000.50.
A U.S. flag. He left the U.S. The sky is blue. | A U.S. flag. / He left the U.S. / The sky is blue.
Dr. Smith and Mrs. Jones met Prof. Li. They wave. | Dr. Smith and Mrs. Jones met Prof. Li. / They wave.
Fruit, e.g. apples, i.e. food, approx. 5 kg. It is ripe. | Fruit, e.g. apples, i.e. food, approx. 5 kg. / It is ripe.
Track No. 5 is empty. Is it open? No. It is shut. | Track No. 5 is empty. / Is it open? / No. / It is shut.
J. R. R. Tolkien wrote it. George W. Bush read it. | J. R. R. Tolkien wrote it. / George W. Bush read it.
Cats, dogs, etc. are here. Cats, dogs, etc. The end. | Cats, dogs, etc. are here. / Cats, dogs, etc. / The end.
It is 5 p.m. in summer. At 6 a.m. The sun rises. | It is 5 p.m. in summer. / At 6 a.m. / The sun rises.
Main St. is busy. St. Peter is shown. | Main St. is busy. / St. Peter is shown.
The dog... runs. It stops... Then it sleeps. | The dog... runs. / It stops... / Then it sleeps.
The dog… runs away… Then nothing… | The dog… runs away… / Then nothing…
What is it?! A dog! Really?? Yes. | What is it?! / A dog! / Really?? / Yes.
A sign reads "Stop!" in red. "Go." She left. | A sign reads "Stop!" in red. / "Go." / She left.
He said “Hello.” Then he left. (It rained.) The end. | He said “Hello.” / Then he left. / (It rained.) / The end.
A man (approx. 40) and a dog (left). Both sit. | A man (approx. 40) and a dog (left). / Both sit.
It was built in 1999. The tower is 30 ft. tall. | It was built in 1999. / The tower is 30 ft. tall.
On Jan. 5 it rained (see Fig. 2). It was cold. | On Jan. 5 it rained (see Fig. 2). / It was cold.
A dog .  A cat . | A dog . / A cat .
The site www.example.com is shown. Node.js too. | The site www.example.com is shown. / Node.js too.
A dog.</s> | A dog.
<s>A dog</s><|im_end|> A cat.<|endoftext|> | A dog / A cat.
1. A dog. 2. A cat. 10) A bird | A dog. / A cat. / A bird
- red ball\n* blue box\n• a hat\n## Style | red ball / blue box / a hat / Style
A dog\n\nA cat.\r\nA bird | A dog / A cat. / A bird
It shows\n7. | It shows / 7.
There are 3 dogs - all brown. The score is 2. | There are 3 dogs - all brown. / The score is 2.
一只狗在跑。天空是蓝色的！真的吗？是 | 一只狗在跑。 / 天空是蓝色的！ / 真的吗？ / 是
彼は「行こう。」と言った。終わり。 | 彼は「行こう。」 / と言った。 / 終わり。
no stop at all | no stop at all
Hi. ... --- * Bye. | Hi. / Bye.
""".strip().splitlines()


@pytest.mark.parametrize("case", CUTS)
def test_sentences_end_where_a_reader_ends_them(case):
    text, sentences = case.split(" | ")
    text = text.replace(r"\n", "\n").replace(r"\r", "\r")
    assert split_sentences(text) == sentences.split(" / ")


WORDS = st.sampled_from("dog Dr. e.g. U.S 3.5 No. 五 It's J. café 👍 a.b (see end) “ok”".split())
GAPS = st.sampled_from([" ", ". ", "! ", "... ", ".\n", "。", "</s>", '." ', "\n"])


@examples(400)
@given(st.lists(st.tuples(WORDS | st.text("abXé", min_size=1), GAPS), max_size=30))
def test_no_word_is_lost_and_no_sentence_is_empty(pairs):
    text = "".join(word + gap for word, gap in pairs)
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.replace("</s>", "").split())
    for sentence in sentences:
        assert sentence == sentence.strip() != ""


# ---- pictures --------------------------------------------------------------------------------------------------------

NOISE = Image.effect_noise((64, 64), 90).convert("RGB")


def encoded(image, format, **options):
    """The bytes of a picture's file."""
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def refusal(source):
    with pytest.raises(BadSample) as caught:
        load_image(source)
    return caught.value


MODES = """
RGB   200,30,60      PNG   200,30,60
RGB   200,30,60      JPEG  200,30,60
RGB   200,30,60      WEBP  200,30,60
RGB   200,30,60      GIF   200,30,60
RGB   200,30,60      BMP   200,30,60
1     1              PNG   255,255,255
L     77             PNG   77,77,77
L     77             JPEG  77,77,77
CMYK  0,255,255,0    JPEG  255,0,0
CMYK  255,0,0,51     JPEG  0,204,204
LA    100,255        PNG   100,100,100
LA    100,0          PNG   255,255,255
RGBA  200,30,60,255  PNG   200,30,60
RGBA  200,30,60,0    PNG   255,255,255
RGBA  0,100,200,51   PNG   204,224,244
RGBA  0,100,200,51   WEBP  204,224,244
""".strip().splitlines()


def colour_of(text):
    return tuple(int(number) for number in text.split(","))


@pytest.mark.parametrize("line", MODES)
def test_every_mode_shows_its_colour_on_white(line):
    mode, colour, format, shown = line.split()
    stored = Image.new(mode, (8, 6), colour_of(colour))
    found = load_image(encoded(stored, format, quality=95, lossless=True))
    assert found.mode == "RGB"
    assert np.abs(np.array(found, dtype=int) - colour_of(shown)).max() <= 3


def test_16_bit_grey_is_scaled_and_not_clipped():
    levels = np.array([[0, 257, 1000, 33000, 40000, 65535]], dtype=np.uint16)
    grey = np.array(load_image(encoded(Image.fromarray(levels), "PNG")))
    assert grey[0, :, 0].tolist() == [0, 1, 4, 128, 156, 255]


def test_exif_turns_the_picture_upright():
    stored = Image.new("RGB", (32, 16), "blue")
    stored.paste("red", (0, 0, 16, 16))
    exif = Image.Exif()
    exif[0x0112] = 6  # what is stored at the left is the top
    found = load_image(encoded(stored, "JPEG", exif=exif, quality=95))
    red, _, blue = found.getpixel((8, 1))
    assert found.size == (16, 32)
    assert red > 200 > 50 > blue


def test_a_broken_exif_block_does_not_cost_the_picture():
    exif = Image.Exif()
    exif[0x0112], exif[0x011A] = 6, 72.0
    wreck = exif.tobytes().replace(b"\x01\x1a\x00\x05", b"\x01\x02\x00\x05")  # a tag of the wrong type: turning fails
    broken = load_image(encoded(NOISE, "JPEG", exif=wreck))
    assert broken.tobytes() == load_image(encoded(NOISE, "JPEG")).tobytes()


def test_a_large_jpeg_is_decoded_small_but_never_below_the_size_wanted():
    jpeg = encoded(Image.new("L", (1600, 1200)), "JPEG")
    heights = {None: 1200, 1201: 1200, 600: 600, 599: 600, 224: 300, 10: 150}
    assert {size: load_image(jpeg, size).height for size in heights} == heights


@pytest.mark.parametrize("content", [
    b"", b"not a picture", b"<html></html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # for EPS, TIFF and the like nothing is started or tried
    encoded(NOISE, "TIFF"), encoded(NOISE, "PPM")], ids=range(8))
def test_what_is_no_picture_will_not_decode(tmp_path, content):
    (tmp_path / "odd.jpg").write_bytes(content)
    bad = refusal(tmp_path / "odd.jpg")
    assert bad.reason == "image will not decode" and "odd.jpg" in bad.detail


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_half_a_file_is_refused_wherever_it_is_cut(format):
    content = encoded(NOISE, format)
    assert load_image(content).size == (64, 64)
    for tenths in range(3, 10):
        assert refusal(content[:len(content) * tenths // 10]).reason == "image will not decode"


def test_a_picture_over_the_limit_is_refused_before_it_is_decoded():
    content = encoded(Image.new("1", (20_000, 20_001)), "PNG")
    bad = refusal(content[:100])  # the header alone decides
    assert bad.reason == "image too large" and "400020000 pixels" in bad.detail


# ---- crops -----------------------------------------------------------------------------------------------------------

def one_picture(folder, pixels, size, part="train", texts={}, **flags):
    """A dataset of JSON lines that name one picture 40 times, so that some fall to training and some to validation."""
    Image.fromarray(pixels).save(folder / "a.png")
    rows = [{"key": str(i), "image": "a.png", "raw": "raw", **texts} for i in range(40)]
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return open_dataset(str(folder / "a.jsonl"), part, 0, size, 0, **flags)


def settings(method="dreamlip", **flags):
    return train.resolve({"method": method, "size": "nano", "whole_caption": 0.0, "device": "cpu", **flags})


def crops(dataset, epochs, s):
    """The samples of some epochs as one batch."""
    samples = TrainingSamples(dataset, scenes, s)
    return collate([samples[epoch, index] for epoch in range(epochs) for index in range(len(dataset))])


def test_evaluation_takes_the_middle_of_a_picture(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    image, _ = one_picture(tmp_path, pixels, 40, "test")[0]
    assert np.array_equal(image.permute(1, 2, 0), pixels[:, 10:50])


def test_a_random_crop_keeps_the_share_and_aspect_asked_for():
    boxes = np.array([crop_box(Image.new("L", (250, 200)), 0.5) for _ in range(300)])
    width, height = (boxes[:, 2:] - boxes[:, :2]).T
    shares = width * height / (250 * 200)
    aspects = width / height
    assert 0.49 < shares.min() < 0.6
    assert 0.74 < aspects.min() < aspects.max() < 1.35


def test_what_becomes_of_a_picture_depends_on_seed_epoch_and_index_alone(tmp_path):
    dataset = one_picture(tmp_path, np.array(NOISE), 16, augment="strong")
    state = torch.get_rng_state()
    images = []
    for seed, epoch, index in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        samples = TrainingSamples(dataset, scenes, settings("clip", seed=seed))
        images.append(samples[epoch, index][0].numpy().tobytes())
    assert images[0] == images[1]
    assert len(set(images)) == 4
    assert torch.equal(torch.get_rng_state(), state)


def test_the_strong_recipe_changes_colours_and_moves_nothing(tmp_path):
    pixels = np.full((40, 40, 3), (200, 90, 30), np.uint8)
    pixels[:, :20] = (30, 90, 200)
    dataset = one_picture(tmp_path, pixels, 32, crop=1.0, augment="strong")
    images = crops(dataset, 20, settings("clip")).images.double()
    coloured = images[images.std(1).mean((1, 2)) > 1]
    left = coloured[..., :12].mean((2, 3))
    right = coloured[..., 20:].mean((2, 3))
    assert left.std(0).min() > 10  # the colours differ from time to time
    assert ((left - right).abs().amax(1) > 20).all()  # the halves stay apart, at their sides


# ---- sentences with a place ------------------------------------------------------------------------------------------

PLACES = {"all.": None, "left.": (0, 0, 0.5, 1), "right.": (0.5, 0, 1, 1), "low.": (0.25, 0.75, 0.5, 1)}
PLACED = Captions("raw", ["short"], list(map(Sentence, PLACES, PLACES.values())), ["raw"])


def places(captions):
    return {sentence.text: sentence.box for sentence in captions.long}


def test_boxes_become_shares_of_the_crop_and_sentences_of_what_is_cut_off_go():
    inside = PLACED.within((0.25, 0.5, 0.75, 1))  # the middle half of the lower half
    assert places(inside) == {"all.": None, "left.": (0, 0, 0.5, 1), "right.": (0.5, 0, 1, 1), "low.": (0, 0.5, 0.5, 1)}

    left = PLACED.within((0, 0, 0.5, 0.8))  # the middle of "low" is at a height of 0.875, that of "right" at 0.75
    assert places(left) == {"all.": None, "left.": (0, 0, 1, 1)}

    corner = Captions("raw", [], [Sentence("corner.", (0, 0, 0.1, 0.1), "SV")], ["raw"])
    assert corner.within((0.5, 0.5, 1, 1)).long == [("corner.", None, "SV")]  # something must be left to draw


@pytest.mark.parametrize("box, patches", [
    ((0.5, 0, 1, 0.5), "0011 0011 0000 0000"),
    ((0.3, 0.3, 0.4, 0.4), "0000 0100 0000 0000"),
    ((0.7, 0.7, 0.8, 0.8), "0000 0000 0011 0011"),
    ((0.5, 0.5, np.nextafter(0.5, 1), np.nextafter(0.5, 1)), "0000 0000 0010 0000"),  # never none
    (None, "1111 1111 1111 1111")])
def test_a_patch_belongs_to_a_box_that_overlaps_it(box, patches):
    found, _ = boxes_to_patches([box, None], 4)
    assert found.tolist() == [digit == "1" for digit in patches.replace(" ", "")]


def test_no_crop_is_flipped_and_the_patches_of_a_sentence_are_those_that_show_what_its_box_held(tmp_path):
    pixels = np.zeros((90, 160, 3), np.uint8)
    pixels[30:75, 40:140] = (255, 0, 0)
    dense = [{"box": [0.25, 1 / 3, 0.875, 5 / 6], "text": "A red field."}]
    s = settings(sub_captions=1, region_grouping=True, image_size=64, patch=4)
    texts = {"dense": dense, "long": "Nothing else."}
    dataset = one_picture(tmp_path, pixels, 64, texts=texts, crop=0.6, caption_fields="long=dense", dense=True)
    batch = crops(dataset, 4, s)
    red = (batch.images[:, :1] > 127).float()
    near = max_pool2d(red, 3, 1, 1)  # and one pixel around, to which a box may reach by a part
    shown, near = (max_pool2d(which, s.patch).flatten(1).bool() for which in (red, near))
    raw, allowed = batch.allowed.unbind(1)
    assert raw.all() and len(set(map(str, allowed.tolist()))) > 10
    assert not (shown & ~allowed).any() and not (allowed & ~near).any()


def test_the_texts_drawn_are_the_same_with_and_without_places_and_each_keeps_its_own():
    s = settings(sub_captions=4)
    without = replace(PLACED, long=list(map(Sentence, PLACES)))
    for seed in range(50):
        texts = draw_texts(PLACED, s, random.Random(seed))
        assert draw_texts(without, s, random.Random(seed)) == [(text, None) for text, _ in texts]
        assert texts == [(text, PLACES.get(text)) for text, _ in texts]


@pytest.mark.parametrize("fields, dense, long", [
    ("", False, ["One.", "Two."]),
    ("", True, ["One.", "Two.", "A cat.", "It sits."]),
    ("long=dense", False, ["A cat.", "It sits."]),
    ("long=denseX+long", True, ["A bird.", "One.", "Two."])])
def test_sentences_of_crops_are_long_captions_with_the_flag_or_by_the_name_of_their_field(fields, dense, long):
    row = {"raw": "r", "captions": {
        "long": "One. Two.",
        "dense": [{"box": [0, 0, 0.5, 1], "text": "A cat. It sits."}],
        "denseX": [{"box": [0, 0, 1, 1], "text": "A bird."}]}}
    captions = read_captions(row, read_fields(fields, dense))
    boxes = {"A cat.": (0, 0, 0.5, 1), "It sits.": (0, 0, 0.5, 1), "A bird.": (0, 0, 1, 1)}
    assert list(places(captions).items()) == [(sentence, boxes.get(sentence)) for sentence in long]


@pytest.mark.parametrize("box", ["[0, 0, 320, 240]", "[0.5, 0, 0.5, 1]", "[0, 0, 1]", '"0 0 1 1"', "[0, 0, 1, null]",
                                 "{}", "[0, 0, NaN, 1]", "[-0.1, 0, 1, 1]"])
def test_what_is_no_box_makes_a_bad_sample(box):
    row = {"raw": "r", "long": [{"box": json.loads(box), "text": "A cat."}]}
    with pytest.raises(BadSample, match="not a box: name, .* is not"):
        read_captions(row, name="name")


# ---- captions in every published layout ------------------------------------------------------------------------------

# A row, and what is found in it: raw | short captions | sentences of the long ones | perspectives.
LAYOUTS = """
{"caption": "A dog. It runs."} = A dog. It runs. |  | A dog. / It runs. | A dog. It runs.
{"caption": ["raw", "One. Two.", "three"]} = raw |  | One. / Two. / three | raw / One. Two. / three
{"caption": ["only"]} = only |  | only | only
{"caption": ["raw", "", null, " b "]} = raw |  | b | raw / b
{"raw": "r", "short": "s", "long": "One. Two."} = r | s | One. / Two. | r
{"raw": "r", "long": ["One.", "Two. Three."], "details": "d", "style": "y"} = r |  | One. / Two. / Three. | r / d /  /  /  / y
{"raw_caption": "r", "shortIB_captions": "I.", "shortSV_captions": "S.", "shortLLA_captions": ""} = r | S. / I. | r | r
{"raw_caption": "r", "longIB_captions": "One. Two.", "longSV_captions": "SV."} = r |  | SV. / One. / Two. | r
{"caption": "alt", "shortIB_captions": ["Short", "caption."], "width": 24} = alt | Short caption. | alt | alt
{"short": "s"} = s | s | s | s
{"key": "0", "captions": {"raw": "r", "long": "One. Two.", "main_object": "m"}} = r |  | One. / Two. | r /  /  /  / m / 
{"raw": "r", "short": "old", "captions": {"short": "new"}} = r | new | r | r
{"url": "u", "org_caption": "r", "re_caption": "One. Two."} = r |  | One. / Two. | r
{"url": "u", "original_caption": "r", "vlm_caption": "One. Two."} = r |  | One. / Two. | r
{"key": "0", "caption": "r", "caption_llava": "One. Two.", "caption_llava_short": "s"} = r | s | One. / Two. | r
{"image_file": "0.jpg", "description": "One. Two."} = One. Two. |  | One. / Two. | One. Two.
{"image": "0.jpg", "short_caption": "s", "extra_caption": "One. Two."} = s | s | One. / Two. | s
{"image/key": "0", "IIW": "One. Two."} = One. Two. |  | One. / Two. | One. Two.
{"file_name": "0.jpg", "text": "r"} = r |  | r | r
{"text": "r", "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "One. Two."}]} = r |  | One. / Two. | r
""".strip().splitlines()


@pytest.mark.parametrize("case", LAYOUTS)
def test_captions_are_found_in_every_published_layout(case):
    row, found = case.split(" = ")
    raw, short, long, perspectives = found.split(" | ")
    captions = read_captions(json.loads(row))
    assert (captions.raw, " / ".join(captions.short), " / ".join(places(captions))) == (raw, short, long)
    assert captions.perspectives == perspectives.split(" / ")


@pytest.mark.parametrize("row", [
    "{}", r'{"caption": "  \n"}', '{"caption": [null, ""]}', '{"captions": "text"}'])
def test_a_row_without_any_text_is_a_bad_sample(row):
    with pytest.raises(BadSample) as caught:
        read_captions(json.loads(row), name="a.png")
    assert caught.value.reason == "no caption" and "a.png" in caught.value.detail


def test_a_flag_names_the_fields_that_captions_are_taken_from():
    row = {"caption": "alt", "title": "title", "longSV_captions": ["One.", "Two. Three."], "extra": "Extra one."}
    captions = read_captions(row, read_fields("raw=title, long=extra+longSV_captions,details=extra"))
    assert (captions.raw, captions.short) == ("title", [])
    assert list(places(captions)) == ["Extra one.", "One.", "Two.", "Three."]
    assert captions.perspectives == ["title", "Extra one.", "", "", "", ""]
    for wrong in ("rwa=title", "raw=", "raw"):
        with pytest.raises(UserError, match="--caption-fields"):
            read_fields(wrong)


# ---- the texts each method draws -------------------------------------------------------------------------------------

LONG = [f"s{i}." for i in range(8)]
CAPTIONS = Captions("raw", ["short"], list(map(Sentence, LONG)), ["raw", "p1", "p2", "p3", "p4", "p5"])
WHOLE = " ".join(LONG)
SENTENCES, POOL = set(LONG), {*LONG, "short"}


def drawn(s, captions=CAPTIONS, n=200):
    """The texts of an image in n draws."""
    return [[text for text, _ in draw_texts(captions, s, random.Random(seed))] for seed in range(n)]


@pytest.mark.parametrize("method, texts", [
    ("clip", [{"raw"}]), ("dreamlip", [{"raw"}, POOL, POOL]), ("lotlip", [{"raw"}, {WHOLE}]),
    ("holistic", [{text} for text in CAPTIONS.perspectives[:5]]), ("sparc", [{"raw"}])])
def test_each_method_draws_its_texts_for_each_slot(method, texts):
    slots = zip(*drawn(settings(method)))
    assert list(map(set, slots)) == texts


def test_holistic_fills_in_what_an_image_lacks():
    for texts in drawn(settings("holistic"), Captions("raw", [], [Sentence("s0."), Sentence("s1.")], ["raw", "p1"])):
        assert texts[:2] == ["raw", "p1"] and set(texts[2:]) == {"s0.", "s1.", "raw"}
    for texts in drawn(settings("holistic"), Captions("raw", [], [Sentence("s0.")], ["raw", "", "p2", "", "p4"])):
        assert texts[::2] == ["raw", "p2", "p4"] and set(texts[1::2]) <= {"s0.", "raw"}  # each branch keeps its text


def test_dreamlip_draws_sub_captions_uniformly_and_without_replacement():
    counts = Counter()
    for _, *texts in drawn(settings(sub_captions=4), n=3000):
        assert len(set(texts)) == 4
        counts.update(texts)
    assert max(counts.values()) / min(counts.values()) < 1.2  # 1333 each, deviation 27


def test_sub_captions_come_twice_only_where_there_are_too_few():
    few = Captions("raw", ["short"], [Sentence("s0."), Sentence("s1.")], ["raw"])
    for row in drawn(settings(sub_captions=7), few):
        assert len(row) == 8 and set(row[1:]) == {"short", "s0.", "s1."}


@pytest.mark.parametrize("flags, pool", [
    (dict(short_caption=False), SENTENCES), (dict(raw_caption=False), POOL | {"raw"}),
    (dict(raw_caption=False, short_caption=False), SENTENCES | {"raw"}), (dict(whole_caption=1.0), POOL | {WHOLE})])
def test_sub_captions_are_drawn_from_the_texts_that_the_flags_name(flags, pool):
    rows = drawn(settings(sub_captions=2, **flags))
    assert set(chain.from_iterable(row[-2:] for row in rows)) == pool


def test_the_whole_caption_is_in_the_pool_of_the_given_share_of_the_images():
    rows = drawn(settings(sub_captions=len(POOL) + 1, whole_caption=0.25))  # the whole pool, and one more
    assert 0.15 < np.mean([WHOLE in row for row in rows]) < 0.35


def test_sampling_first_takes_the_same_k_every_time():
    for row in drawn(settings(sub_captions=3, sampling="first")):
        assert row == ["raw", "s0.", "s1.", "s2."]


def test_a_long_text_joins_consecutive_sentences():
    rows = {row[1] for row in drawn(settings("lotlip", long_sentences=3))}
    assert rows == {" ".join(LONG[first:first + 3]) for first in range(6)}
    assert {row[2] for row in drawn(settings("lotlip", long_texts=2, long_sentences=20))} == {WHOLE}


DREAMLIP = {  # a row of its CSV, with the captions of three models
    "raw_caption": "raw", "shortSV_captions": "sv", "shortIB_captions": "ib",
    "longSV_captions": "SV 0. SV 1. SV 2.", "longIB_captions": "IB 0. IB 1. IB 2.", "longLLA_captions": "LLA 0. LLA 1."}


def test_long_texts_are_of_different_models_and_never_of_two():
    captions = read_captions(DREAMLIP)
    orders = set()
    for n in (0, 2):
        for _, *texts in drawn(settings("lotlip", long_texts=3, long_sentences=n), captions):
            for text in texts:
                assert any(text in caption for caption in DREAMLIP.values())
            orders.add(tuple(text.split()[0] for text in texts))
    assert orders == set(permutations(["SV", "IB", "LLA"]))


def test_a_whole_caption_is_that_of_one_model():
    whole = {text for name, text in DREAMLIP.items() if name.startswith("long")}
    rows = drawn(settings(sub_captions=12, whole_caption=1.0), read_captions(DREAMLIP))
    assert {len(whole.intersection(texts)) for texts in rows} == {1}
    assert whole <= set(chain.from_iterable(rows))

