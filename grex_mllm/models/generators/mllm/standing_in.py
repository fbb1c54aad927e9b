"""What stands for tokenizer and chat template of a multimodal model whose folder is not there: one token a word, to count sizes with."""

from __future__ import annotations

from pathlib import Path

from grex_mllm.errors import fault
from grex_mllm.models.generators.mllm.config import MllmConfig
from grex_mllm.models.generators.mllm.parts import pixel_limits, read_chat
from grex_mllm.models.lm_shapes import config_of
from grex_mllm.models.multimodal.chat import Chat, picture_settings

NAMES = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
SYSTEM = "You are a helpful assistant ."
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|> system SYSTEM <|im_end|> ' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|> ' + message['role'] + ' ' }}{% for part in message['content'] %}"
    "{{ '<|vision_start|> <|image_pad|> <|vision_end|> ' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ ' <|im_end|> ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}"
).replace("SYSTEM", SYSTEM)


def stand_in_tokenizer(config: MllmConfig) -> Chat:
    """Return the chat of the model's folder; where there is none, one of the same sizes, of a model among the published ones.

    Raises:
        GrexError: neither a folder nor a published size, or one of a family other than Qwen-VL.
    """
    if (Path(config.lm) / "config.json").is_file():
        return read_chat(config)
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    sizes = config_of(config.lm)
    if not sizes.model_type.startswith("qwen"):
        raise fault(f"model {config.lm} of type {sizes.model_type}", "its folder, or a model of the Qwen-VL families", "give its folder")
    ids = {"<unk>": 0, **dict(zip(NAMES, (1, sizes.text_config.eos_token_id, sizes.vision_start_token_id, sizes.vision_end_token_id,
                                          sizes.image_token_id), strict=True))}  # fmt: skip
    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in NAMES])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = TEMPLATE
    patch = {"patch_size": sizes.vision_config.patch_size, "size": {"shortest_edge": 3136, "longest_edge": 12845056}}
    return Chat(sizes, tokenizer, picture_settings(sizes.model_type, patch, pixel_limits(config), None), {})
