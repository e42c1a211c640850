"""A vision-language model for the tests: LLaVA's architecture, random weights, a tokenizer of bytes. Nothing is
downloaded.

    python tests/tiny_vlm.py FOLDER
"""
import sys

CHAT = ("{% for m in messages %}{% for c in m['content'] %}"
        "{% if c['type'] == 'image' %}<image>{% else %}{{ c['text'] }}{% endif %}"
        "{% endfor %}{% endfor %} ASSISTANT:")


def make(folder):
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (CLIPImageProcessor, CLIPVisionConfig, LlamaConfig, LlavaConfig,
                              LlavaForConditionalGeneration,
                              LlavaProcessor, PreTrainedTokenizerFast)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["Ġ" + word for word in "a the dog cat sofa red blue large small on under beside sleeps runs".split()]
    vocabulary = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", "<image>", *letters, *words])}
    tokens = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokens.pre_tokenizer, tokens.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
                                        additional_special_tokens=["<image>"])
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text = LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, max_position_embeddings=2048, pad_token_id=0,
                       bos_token_id=1, eos_token_id=2, **sizes)
    vision = CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=32, **sizes)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_index=3,
                                                      vision_feature_select_strategy="default"))
    # it says words or ends
    model.generation_config.suppress_tokens = [i for i in range(len(vocabulary) - len(words)) if i != 2]
    model.generation_config.do_sample, model.generation_config.min_new_tokens = True, 4
    with torch.no_grad():
        model.get_output_embeddings().weight *= 0.2  # any of them, about as often
    model.save_pretrained(folder)
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(pictures, tokenizer, patch_size=14, vision_feature_select_strategy="default",
                   num_additional_image_tokens=1, image_token="<image>", chat_template=CHAT).save_pretrained(folder)


if __name__ == "__main__":
    make(sys.argv[1])
