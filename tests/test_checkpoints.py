"""Checkpoints travel: other people's weights give here what their own modules give, and ours give there what they give here."""
import json

import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers

from model import CLIP, CLIPConfig, from_state_dict, resized, to_open_clip
from test_model import SMALL, pictures, reference, same, texts

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
    for ours in (from_state_dict(theirs.state_dict(), image_size=size, **overrides),
                 resized(from_state_dict(theirs.state_dict(), **overrides), size)):
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

def holistic_class_tokens(vision, images, H):
    """open_clip's vision tower with H class tokens that are blind to one another (2412.00440, section 3.2)."""
    v = vision
    x = v.conv1(images).flatten(2).mT
    x = torch.cat([v.class_embedding.expand(len(x), -1, -1), x], 1) + v.positional_embedding
    hidden = torch.zeros(x.shape[1], x.shape[1], dtype=torch.bool)
    hidden[:H, :H] = ~torch.eye(H, dtype=torch.bool)
    x = v.transformer(v.ln_pre(x), attn_mask=torch.zeros(hidden.shape).masked_fill(hidden, -torch.inf))
    return F.normalize(v.ln_post(x)[:, :H] @ v.proj, dim=-1)


@torch.no_grad()
def test_several_class_tokens_with_a_position_each_are_holistic_clips():
    theirs, overrides = reference(SHAPE, quick=False)
    v, H = theirs.visual, 3
    v.class_embedding = torch.nn.Parameter(torch.randn(H, 128))
    v.positional_embedding = torch.nn.Parameter(torch.randn(H + 16, 128))
    ours = from_state_dict(theirs.state_dict(), **overrides).eval()
    assert ours.config.branches == H and ours.config.branch_type == "class" and ours.config.image_size == 32
    assert same(ours.encode_image(pictures(2, 32))[0], holistic_class_tokens(v, pictures(2, 32), H))


@torch.no_grad()
def test_parallel_mlps_are_holistic_clips():
    """Their names: the shared first layer is mlp.c_fc, the H second ones c_proj.0 ... c_proj.H-1, in the last layers."""
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


def lotlip(seed=0):
    torch.manual_seed(seed)
    vit = shaken(timm.create_model("vit_base_patch16_224.augreg_in21k", pretrained=False, num_classes=0, global_pool="token",
                                   img_size=32, patch_size=8, embed_dim=128, depth=2, num_heads=2), seed)
    bert = shaken(transformers.BertModel(transformers.BertConfig(
        vocab_size=V + C, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512,
        max_position_embeddings=40, attn_implementation="eager")), seed + 1)
    proj = torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)) / 11
    state = {"visual.trunk." + name: value for name, value in vit.state_dict().items()}
    state |= {"text.transformer." + name: value for name, value in bert.state_dict().items()}
    return vit, bert, proj, state | {"text.proj.weight": proj, "logit_scale": torch.tensor(2.0)}


@torch.no_grad()
def bert_with_corners(bert, proj, words):
    """[CLS], corners, words, [SEP] -> summary embeddings [1, 1+C, D], by LoTLIP's mask (2410.05249, section 3.2)."""
    ids = torch.tensor([[101, *range(V, V + C), *words, 102]])
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
    with pytest.raises(ValueError, match="half a checkpoint, or another architecture|not the state dict of") as caught:
        from_state_dict(broken(name))
    assert "\n" not in str(caught.value)


def test_reading_a_checkpoint_leaves_the_callers_tensors_alone():
    for state in (lotlip()[-1], reference(SHAPE, quick=False)[0].state_dict()):
        before = {name: value.clone() for name, value in state.items()}
        from_state_dict(state)
        assert all(torch.equal(value, before[name]) for name, value in state.items())
