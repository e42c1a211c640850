"""Captions become CLIP's ids exactly, our vocabulary is what its definition says, sentences are cut where they end, and
the place of a sentence goes with it to the loss."""
import gzip
import hashlib
import json
import math
import pickle
import random
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from open_clip.tokenizer import SimpleTokenizer, default_bpe
from PIL import Image

import data as data
import train
from data import (BadSample, Captions, Pictures, Records, SceneImages, TrainingTexts, UserError, collate, draw_texts,
                  load_tokenizer, patches_of, read_captions, read_fields, read_tiktoken, save_tiktoken,
                  split_sentences, train_bpe)

# ---- CLIP's tokenizer ------------------------------------------------------------------------------------------------

reference = SimpleTokenizer()
clip = load_tokenizer("clip")

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


def ids_agree(text, context_length=77):
    return torch.equal(clip(text, context_length), reference(text, context_length))


@pytest.mark.parametrize("text", ODD, ids=range(len(ODD)))
def test_odd_text_gets_open_clips_ids(text):
    assert clip.encode(text) == reference.encode(text)
    assert all(ids_agree(text, length) for length in (2, 3, 5, 77, 300))


@settings(max_examples=2500, deadline=None, database=None)
@given(st.text(max_size=120))
def test_any_unicode_text_gets_open_clips_ids(text):
    assert clip.encode(text) == reference.encode(text)


SCRAPS = st.sampled_from(["&amp;", "&lt;", "&#39;", "&#x", "'s", "'LL", "’t", "<end_of_text>",
    "<start_of_text>", "</w>", " ", "\n", "é", "e\u0301", "Ã©", "日", "☂", "👍", "3.5", "½", "...", "_", "DOG",
    "umbrellas", "\u200d", "\xa0", "ſ", ";", "&"])


@settings(max_examples=1500, deadline=None, database=None)
@given(st.lists(SCRAPS | st.text("abcdeinorst", max_size=8), max_size=25).map("".join))
def test_markup_entities_and_scripts_run_together_get_open_clips_ids(text):
    assert clip.encode(text) == reference.encode(text)


def test_every_word_of_clips_vocabulary_and_20000_made_up_ones_get_open_clips_ids():
    words = [symbol.removesuffix("</w>") for symbol in reference.encoder]
    words = [bytes(reference.byte_decoder[c] for c in word).decode(errors="ignore") for word in words[:-2]]
    pick = random.Random(0)
    made_up = ["".join(pick.choices(words, k=pick.randint(2, 4))) for _ in range(20_000)]
    words = words + made_up
    texts = [" ".join(words[i:i + 25]) for i in range(0, len(words), 25)]
    assert len(texts) > 2_500
    assert [text for text in texts if clip.encode(text) != reference.encode(text)] == []


def test_a_row_is_start_ids_end_zeros_and_the_end_survives_truncation():
    ids = clip.encode("a red umbrella")
    assert (clip.sot, clip.eot, clip.vocab_size) == (49406, 49407, 49408)
    assert clip("a red umbrella", 7).tolist() == [[clip.sot, *ids, clip.eot, 0, 0]] and len(ids) == 3
    assert clip("a red umbrella", 4).tolist() == [[clip.sot, *ids[:2], clip.eot]]
    assert clip("a red umbrella", 5).tolist() == [[clip.sot, *ids, clip.eot]]
    assert clip("", 3).tolist() == [[clip.sot, clip.eot, 0]]


def test_a_batch_is_its_rows_and_the_end_is_the_greatest_id_of_each():
    texts = ["a red umbrella", "", "x " * 50]
    batch = clip(texts, 12)
    assert batch.dtype == torch.int64 and batch.shape == (3, 12)
    assert torch.equal(batch, torch.cat([clip(text, 12) for text in texts]))
    assert batch.argmax(1).tolist() == [4, 1, 11]
    assert clip([], 12).shape == (0, 12)


def test_the_cache_is_not_touched_by_what_a_caller_does_to_its_rows():
    before = clip("one two three", 4).clone()
    clip("one two three", 4).fill_(0)
    assert torch.equal(clip("one two three", 4), before)
    assert clip("one two three", 9).argmax().item() == 4  # a short request did not shorten the cached row


def test_decode_gives_back_the_words_and_stops_at_the_end():
    assert clip.decode(clip.encode("It's a  DOG, 10 cm!")) == "it 's a dog , 1 0 cm !"
    assert clip.decode(clip("a dog", 9)[0]) == "a dog"


@settings(max_examples=300, deadline=None, database=None)
@given(st.text(max_size=60))
def test_decoding_undoes_encoding_up_to_spacing(text):
    cleaned = data.clean_text(text, clip.fix_text).replace(data.SOT, "").replace(data.EOT, "").replace(" ", "")
    cleaned = cleaned.encode(errors="replace").decode()
    assert clip.decode(clip.encode(text)).replace(" ", "") == cleaned


def test_a_pickled_tokenizer_works_in_a_process_that_never_saw_the_vocabulary():
    code = ("import pickle, sys; t = pickle.load(sys.stdin.buffer); "
            "print(t('a café umbrella', 9).tolist(), t.name, t.vocab_size)")
    done = subprocess.run([sys.executable, "-c", code], input=pickle.dumps(clip), capture_output=True, check=True)
    out = done.stdout.decode()
    assert out.split("]]")[0] + "]]" == str(clip("a café umbrella", 9).tolist())
    assert out.split()[-2:] == ["clip", "49408"]


def test_without_ftfy_only_broken_text_differs_and_it_is_said_once(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ftfy", None)  # makes the import fail
    data.say_once.cache_clear()
    bare = load_tokenizer("clip")
    load_tokenizer("clip")
    assert capsys.readouterr().out.count("ftfy is not installed") == 1
    assert bare.encode("a caf\u00e9 &amp; a dog") == clip.encode("a caf\u00e9 &amp; a dog")
    assert bare.encode("cafÃ©") != clip.encode("cafÃ©")
    assert bare.decode(bare.encode("\ud800")) == "\ufffd"  # a lone surrogate, which ftfy would have replaced before


# ---- where the vocabulary comes from ---------------------------------------------------------------------------------

class Answer:
    def __init__(self, content):
        self.content = content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self):
        return self.content


@pytest.fixture
def bare_machine(monkeypatch, tmp_path):
    """No open_clip, no clip, an empty home, and a network that returns what .answer says; .calls counts."""
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("HOME", str(tmp_path))
    data.say_once.cache_clear()

    class Network:
        answer, calls, cache = OSError("Network is unreachable"), 0, tmp_path / ".cache" / "clip"

        def open(self, url, timeout):
            assert url == data.CLIP_URL
            self.calls += 1
            if isinstance(self.answer, Exception):
                raise self.answer
            return Answer(self.answer)

    network = Network()
    monkeypatch.setattr(urllib.request, "urlopen", network.open)
    return network


def test_the_checksum_is_that_of_the_file_open_clip_ships():
    assert hashlib.sha256(Path(default_bpe()).read_bytes()).hexdigest() == data.CLIP_SHA256


def test_the_vocabulary_is_downloaded_once_and_then_read_from_the_cache(bare_machine):
    bare_machine.answer = Path(default_bpe()).read_bytes()
    assert load_tokenizer("clip").encode("a dog") == clip.encode("a dog")
    assert load_tokenizer("auto").name == "clip" and bare_machine.calls == 1
    assert [path.name for path in bare_machine.cache.iterdir()] == [data.CLIP_VOCABULARY]  # nothing temporary is left


@pytest.mark.parametrize("answer", [OSError("Network is unreachable"), b"<html>please log in</html>"])
def test_a_failed_download_is_one_sentence_with_the_remedy_and_leaves_nothing(bare_machine, answer):
    bare_machine.answer = answer
    with pytest.raises(UserError, match="pip install open_clip_torch") as caught:
        load_tokenizer("clip")
    assert "\n" not in str(caught.value) and str(bare_machine.cache) in str(caught.value)
    assert not list(bare_machine.cache.parent.rglob("*gz*"))


def test_auto_takes_the_scenes_vocabulary_when_clips_cannot_be_had_and_says_so(
        bare_machine, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(data, "SCENES_VOCABULARY", tmp_path / "scenes.tiktoken")
    save_tiktoken(tmp_path / "scenes.tiktoken", train_bpe(["a red dog"], 270))
    assert load_tokenizer("auto").name == "scenes"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "scenes instead of clip" in said


def test_a_clip_style_file_is_taken_by_path(tmp_path):
    copy = tmp_path / "mine.txt.gz"
    copy.write_bytes(gzip.compress(b"#version\nd o\ndo g</w>\n"))
    mine = load_tokenizer(copy)
    assert (mine.name, mine.vocab_size) == ("mine", 512 + 2 + 2)
    assert mine.encode("dog do") == [513, clip.encode("d")[0] - 256, clip.encode("o")[0]]  # 'do' inside a word only


@pytest.mark.parametrize("name, content, says", [
    ("clop", None, "auto, clip, scenes"), ("gone.txt.gz", None, "no tokenizer file"),
    ("gone.tiktoken", None, "no tokenizer file"),
    ("bad.txt.gz", b"not gzip", "not a CLIP vocabulary"),
    ("bad.txt.gz", gzip.compress(b"v\na b c\n"), "not a CLIP vocabulary"),
    ("two.txt.gz", gzip.compress(b"v\na b\na b\n"), "listed twice"),
    ("cut.txt.gz", gzip.compress(b"v\na b\n" * 99)[:-12], "not a CLIP vocabulary"),
    ("bad.tiktoken", b"\x00\x01\n", "not a .tiktoken file"), ("bad.tiktoken", b"YQ== x\n", "not a .tiktoken file"),
    ("few.tiktoken", b"YQ== 0\n", "256 single bytes")])
def test_a_wrong_tokenizer_is_one_sentence(tmp_path, name, content, says):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        load_tokenizer(name if name == "clop" else path)
    assert "\n" not in str(caught.value) and name in str(caught.value)


# ---- our own vocabulary ----------------------------------------------------------------------------------------------

CORPUS = [f"A {size} {colour} {thing} is {place} the {other}, isn't it? It's {n}% café."
    for n, (size, colour, thing, place, other) in enumerate(
        (s, c, t, p, o) for s in ("small", "large") for c in ("red", "green", "greenish")
        for t in ("umbrella", "anchor", "aaaaaa", "banana") for p in ("above", "below") for o in ("snowman", "skull"))]


def naive_bpe(words, ranks):
    """Every word's parts, by the definition: lowest rank first, leftmost first, from single bytes."""
    result = {}
    for word in words:
        parts = [word[i:i + 1] for i in range(len(word))]
        while any(a + b in ranks for a, b in zip(parts, parts[1:])):
            i = min(range(len(parts) - 1), key=lambda i: (ranks.get(parts[i] + parts[i + 1], 10**9), i))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        result[word] = parts
    return result


def test_training_is_counting_all_pairs_anew_and_joining_the_most_frequent_each_time():
    counts = Counter(w.encode() for text in CORPUS for w in data.split_words(data.clean_text(text)))
    ranks = {bytes([b]): b for b in range(256)}
    for _ in range(60):
        pairs = Counter()
        for word, parts in naive_bpe(counts, ranks).items():
            for a, b in zip(parts, parts[1:]):
                pairs[a + b] += counts[word]
        most = max(pairs.values())
        ranks[min(pair for pair in pairs if pairs[pair] == most)] = len(ranks)
    assert list(train_bpe(CORPUS, len(ranks) + 2).items()) == list(ranks.items())


def test_training_does_not_depend_on_the_order_of_the_texts_and_stops_when_all_words_are_whole():
    ranks = train_bpe(CORPUS, 5000)
    assert ranks == train_bpe(CORPUS[::-1], 5000) and 256 < len(ranks) < 600
    tokenizer = data.Tokenizer("own", ranks)
    assert all(len(tokenizer.encode(word)) == 1 for text in CORPUS
               for word in data.WORDS.findall(data.clean_text(text)))


own = data.Tokenizer("own", train_bpe(CORPUS, 320))


@settings(max_examples=200, deadline=None, database=None)
@given(st.text(max_size=40) | st.text("abn gre", max_size=60))
def test_the_small_tokenizer_reads_any_text_as_the_definition_says(text):
    words = [word.encode(errors="replace") for word in data.split_words(data.clean_text(text))
             if word.strip() not in (data.SOT, data.EOT)]
    expected = [own.ranks[part] for word in words for part in naive_bpe([word], own.ranks)[word]]
    assert [i for i in own.encode(text) if i < own.sot] == expected
    assert own.decode(own.encode(text)) == own.decode(expected)


def test_a_vocabulary_survives_its_file(tmp_path):
    ranks = train_bpe(CORPUS, 320)
    save_tiktoken(tmp_path / "own.tiktoken", ranks)
    assert read_tiktoken(tmp_path / "own.tiktoken") == ranks
    own = load_tokenizer(tmp_path / "own.tiktoken")
    assert (own.name, own.vocab_size, own.sot, own.eot) == ("own", 320, 318, 319)
    assert own("a red umbrella", 30).argmax().item() == len(own.encode("a red umbrella")) + 1


def test_a_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(UserError, match="too small"):
        train_bpe(CORPUS, 257)
    assert len(train_bpe(CORPUS, 258)) == 256


# ---- sentences -------------------------------------------------------------------------------------------------------

CUTS = """
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
- red ball\\n* blue box\\n• a hat\\n## Style | red ball / blue box / a hat / Style
A dog\\n\\nA cat.\\r\\nA bird | A dog / A cat. / A bird
It shows\\n7. | It shows / 7.
There are 3 dogs - all brown. The score is 2. | There are 3 dogs - all brown. / The score is 2.
一只狗在跑。天空是蓝色的！真的吗？是 | 一只狗在跑。 / 天空是蓝色的！ / 真的吗？ / 是
彼は「行こう。」と言った。終わり。 | 彼は「行こう。」 / と言った。 / 終わり。
no stop at all | no stop at all
Hi. ... --- * Bye. | Hi. / Bye.
""".strip().splitlines()


@pytest.mark.parametrize("case", CUTS)
def test_sentences_end_where_a_reader_ends_them(case):
    text, sentences = case.split(" | ")
    assert split_sentences(text.replace("\\n", "\n").replace("\\r", "\r")) == sentences.split(" / ")


@pytest.mark.parametrize("text", ["", " \n\t", "</s>", "...", "-\n*\n", "<s></s>"])
def test_nothing_gives_no_sentence(text):
    assert split_sentences(text) == []


@settings(max_examples=500, deadline=None, database=None)
@given(st.lists(st.tuples(
    st.sampled_from("dog Dr. e.g. U.S 3.5 No. 五 It's J. café 👍 a.b (see end) “ok”".split())
    | st.text("abXé", min_size=1),
    st.sampled_from([" ", ". ", "! ", "... ", ".\n", "。", "</s>", '." ', "\n"])), max_size=30))
def test_no_word_is_lost_and_no_sentence_is_empty(pairs):
    text = "".join(word + gap for word, gap in pairs)
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.replace("</s>", "").split())
    assert all(sentence == sentence.strip() != "" for sentence in sentences)


@pytest.mark.parametrize("piece", ["e.g. ", ".", "a.", '."', "(", "。", "<|", "1. ", "[EO", "J. K", " ", "\n", "- "])
def test_time_grows_with_the_text_and_not_with_its_square(piece):
    start = time.perf_counter()
    split_sentences(piece * (1_000_000 // len(piece)))
    assert time.perf_counter() - start < 5  # a quadratic scan of a million characters takes many minutes


# ---- sentences with a place ------------------------------------------------------------------------------------------

PLACED = Captions("raw", ["short"], ["all.", "left.", "right.", "low."], ["raw"],
                  [None, (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0.25, 0.75, 0.5, 1)])


def test_boxes_become_shares_of_the_crop_and_sentences_of_what_is_cut_off_go():
    inside = PLACED.within((0.25, 0.5, 0.75, 1))  # the middle half of the lower half
    assert inside.long == PLACED.long and inside.boxes == [None, (0, 0, 0.5, 1), (0.5, 0, 1, 1), (0, 0.5, 0.5, 1)]
    left = PLACED.within((0, 0, 0.5, 0.8))  # the middle of "low" is at a height of 0.875, that of "right" at 0.75
    assert left.long == ["all.", "left."] and left.boxes == [None, (0, 0, 1, 1)]
    assert (left.raw, left.short, left.perspectives) == (PLACED.raw, PLACED.short, PLACED.perspectives)
    assert PLACED.within((0, 0, 1, 1)) == PLACED
    gone = Captions("raw", [], ["corner."], ["raw"], [(0, 0, 0.1, 0.1)]).within((0.5, 0.5, 1, 1))
    assert gone == Captions("raw", [], ["corner."], ["raw"])  # something must be left to draw: it is without a place


def test_a_patch_belongs_to_a_box_that_overlaps_it():
    boxes = [(0.5, 0, 1, 0.5), (0.3, 0.3, 0.4, 0.4), (0, 0.25, 1, 0.5), (0.7, 0.7, 0.8, 0.8)]
    rows = ["0011 0011 0000 0000", "0000 0100 0000 0000", "0000 1111 0000 0000", "0000 0000 0011 0011"]
    found = ["".join(str(int(x)) for x in row) for row in patches_of(boxes, 4)]
    assert found == [row.replace(" ", "") for row in rows]
    assert patches_of([None, (0, 0, 1, 1)], 7).all() and patches_of([None], 3).shape == (1, 9)
    least = np.nextafter(0.5, 1)
    assert patches_of([(0.5, 0.5, least, least)], 8).sum() == 1  # never none


def test_in_every_crop_what_a_box_holds_lies_in_the_patches_of_its_text(tmp_path):
    picture = np.zeros((90, 160, 3), np.uint8)
    picture[30:75, 40:120] = (255, 0, 0)
    Image.fromarray(picture).save(tmp_path / "a.png")
    dense = [{"box": [0.25, 1 / 3, 0.75, 5 / 6], "text": "A red field."}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": "a.png", "raw": "red", "dense": dense}))
    pictures = Pictures(Records(tmp_path / "a.jsonl"), 64, "all", 0.5, read_fields("", dense=True))
    pictures.train = True
    for seed in range(40):
        image, captions = pictures.__getitem__(0, random.Random(seed))
        x0, y0, x1, y1 = (64 * edge for edge in captions.boxes[0])
        y, x = np.nonzero(image[0].numpy() > 127)
        for found, edge in ((x.min(), x0), (x.max() + 1, x1), (y.min(), y0), (y.max() + 1, y1)):
            assert abs(found - edge) < 1  # to the pixel
    assert seed == 39 and len({tuple(pictures.__getitem__(0, random.Random(seed))[1].boxes) for seed in range(9)}) == 9


def settings_of(**flags):
    return train.resolve({"method": "dreamlip", "size": "nano", "tokenizer": "scenes", "precision": "fp32", "batch": 8,
                          "device": "cpu", "workers": 0, "region_grouping": True, **flags})


def test_the_texts_drawn_are_the_same_with_and_without_places_and_each_keeps_its_own():
    s, places = settings_of(sub_captions=4), dict(zip(PLACED.long, PLACED.boxes))
    for seed in range(50):
        texts = draw_texts(PLACED, s, random.Random(seed))
        assert all(box == places.get(text) for text, box in texts)
        without = draw_texts(replace(PLACED, boxes=[]), s, random.Random(seed))
        assert without == [(text, None) for text, _ in texts]


@pytest.mark.parametrize("fields, dense, long", [
    ("", False, ["One.", "Two."]), ("", True, ["One.", "Two.", "A cat.", "It sits.", "A dog."]),
    ("long=dense", False, ["A cat.", "It sits.", "A dog."]), ("long=denseX+long", True, ["A bird.", "One.", "Two."])])
def test_sentences_of_crops_are_long_captions_with_the_flag_or_by_the_name_of_their_field(fields, dense, long):
    row = {"raw": "r", "captions": {
        "long": "One. Two.", "denseX": [{"box": [0, 0, 1, 1], "text": "A bird."}],
        "dense": [{"box": [0, 0, 0.5, 1], "text": "A cat. It sits."}, {"box": [0.5, 0, 1, 1], "text": "A dog."}]}}
    captions = read_captions(row, read_fields(fields, dense))
    assert captions.long == long
    boxes = {"A cat.": (0, 0, 0.5, 1), "It sits.": (0, 0, 0.5, 1), "A dog.": (0.5, 0, 1, 1), "A bird.": (0, 0, 1, 1)}
    assert captions.boxes == ([boxes.get(sentence) for sentence in long] if "long=" in fields or dense else [])


def test_captions_of_crops_alone_are_enough():
    row = {"dense": [{"box": [0, 0, 0.5, 1], "text": "A cat."}]}
    assert read_captions(row, read_fields("long=dense")) == Captions(
        "A cat.", [], ["A cat."], ["A cat."], [(0, 0, 0.5, 1)])


@pytest.mark.parametrize("box", [[0, 0, 320, 240], [0.5, 0, 0.5, 1], [0, 0, 1], "0 0 1 1", [0, 0, 1, None], {},
                                 [0, 0, math.nan, 1], [-0.1, 0, 1, 1]], ids=str)
def test_a_box_that_is_none_makes_a_bad_sample(box):
    with pytest.raises(BadSample, match="not a box: name, .* is not"):
        read_captions({"raw": "r", "long": [{"box": box, "text": "A cat."}]}, name="name")


def placed_batch(s):
    s.images = s.batch
    samples = TrainingTexts(SceneImages("train", s.batch, s.image_size, s.kinds), load_tokenizer("scenes"), s)
    images, tokens, *which = train.to_device(collate([samples[0, i] for i in range(s.batch)]), s)
    s.vocab = samples.tokenizer.vocab_size
    return train.build(s), images, tokens, which


@pytest.mark.parametrize("flags", [
    dict(negatives="image"), dict(negatives="batch"), dict(negatives="slot"), dict(grouping="token"),
    dict(grouping="token", negatives="batch")], ids=str)
def test_a_batch_in_parts_has_the_gradients_of_the_whole_with_places_too(flags):
    gradients = []
    for changes in (dict(accumulate=1), dict(accumulate=4), dict(region_grouping=False)):
        s = settings_of(**flags, **changes)
        model, images, tokens, which = placed_batch(s)
        loss, _ = train.backward(model, images, tokens, s, *which)
        gradients.append([loss, *(p.grad for p in model.parameters())])
    whole, parts, anywhere = gradients
    assert all(torch.allclose(a, b, rtol=1e-4, atol=2e-6) for a, b in zip(whole, parts, strict=True))
    assert (whole[0] - anywhere[0]).abs() > 1e-4  # the places do count


@pytest.mark.parametrize("grouping", ["sub-caption", "token"])
def test_patches_outside_the_places_of_all_texts_get_no_gradient_from_the_grouping_loss(grouping):
    s = settings_of(grouping=grouping, contrastive_weight=0.0, raw_caption=False)
    model, images, tokens, (good, allowed, *_) = placed_batch(s)
    assert good is None and allowed.shape == (8, 3, 16)
    out = train.embed(model, images, tokens, s)
    out["patches"].retain_grad()
    train.method_loss(out, s, None, allowed)[0].backward()
    outside = ~allowed.any(1)
    assert outside.any() and not out["patches"].grad[outside].any() and out["patches"].grad[~outside].any()


@pytest.mark.parametrize("flags", [dict(method="clip"), dict(method="sparc"), dict(sampling="whole", negatives="batch"),
                                   dict(grouping="none")], ids=str)
def test_places_without_sub_captions_that_group_are_refused(flags):
    with pytest.raises(UserError, match="--grouping sub-caption --sub-captions 3"):
        settings_of(**flags)
