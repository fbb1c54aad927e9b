"""The knobs of the image encoder, the text encoder and the pixel decoder, as a part of `config.py`, which gives them out."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class VisionConfig:
    """Image encoder. name: resnet | swin | darknet53 | efficientnet_lite0 | timm:<model> | hf:<path or hub id>.

    weights: safetensors, or None.
    """

    name: str = "resnet"
    weights: str | None = None
    # resnet
    block: str = "bottleneck"  # bottleneck | basic
    stem: str = "conv7"  # conv7 (stride 2, max pool) | conv3 (one 3x3 convolution of stride 2)
    norm: str = "frozen_batch"  # frozen_batch | group; also of darknet53
    stem_width: int = 64
    widths: list[int] = field(default_factory=lambda: [256, 512, 1024, 2048])
    bottleneck_widths: list[int] = field(default_factory=lambda: [64, 128, 256, 512])
    depths: list[int] = field(default_factory=lambda: [3, 4, 6, 3])
    coordinates: bool = False  # feed x and y positions as two more input channels
    # darknet53
    darknet_width: int = 32  # of the stem; every stage doubles it
    darknet_depths: list[int] = field(default_factory=lambda: [1, 2, 8, 8, 4])
    # swin
    embed_width: int = 128
    swin_depths: list[int] = field(default_factory=lambda: [2, 2, 18, 2])
    swin_heads: list[int] = field(default_factory=lambda: [4, 8, 16, 32])
    window: int = 12
    drop_path: float = 0.3
    fusion: str = "none"  # none | pwam (language fused after every stage)
    # closed (as the released ReLA: gates 0, projections like the encoder's) | open (as LAVT: gates random, projections by torch's default)
    fusion_start: str = "closed"
    gradient_checkpointing: bool = False  # compute the blocks again in the backward pass: less memory, more time
    patches: int = 0  # cut the image into so many squared patches, each encoded alone (GRES paper, table 2, "hard split, input"); 0 = whole


@dataclass
class TextConfig:
    """Text encoder. name: bert | bigru (word vectors and a bi-directional GRU, `models/words.py`).

    path: a folder with weights to start from, of bigru a text file of word vectors (GloVe's); else random weights of the given sizes.
    tokenizer: a folder with tokenizer.json or vocab.txt (default: that of `path`, of bigru the first `vocab_size` words of the file), or
    "train" to make one from the training expressions.
    """

    name: str = "bert"
    path: str | None = None
    tokenizer: str | None = None
    vocab_size: int = 30522
    hidden_size: int = 768  # of bigru the width of each direction, which are added
    word_width: int = 300  # of bigru's word vectors
    sentence: str = "attention"  # of bigru: attention (a weight for every word) | channels (and every channel) | final (the last states)
    num_layers: int = 12
    num_heads: int = 12
    intermediate_size: int = 3072
    max_positions: int = 512
    max_tokens: int = 20
    pad: str = "max"  # max (as released: the decoder reads padding rows, too) | longest (of the batch: less work)
    dropout: float = 0.1
    gradient_checkpointing: bool = False
    attention: str = "sdpa"  # sdpa | eager (training tiny sizes on a CPU is faster with it) | flash_attention_2


@dataclass
class PixelDecoderConfig:
    """name: deformable (multi-scale deformable attention) | fpn (plain feature pyramid) | fpn_levels (its three coarser levels alone) |
    top_down (LAVT's: concatenate and convolve). The last two are `width` wide everywhere."""

    name: str = "deformable"
    width: int = 256
    mask_width: int = 256
    num_layers: int = 6
    num_heads: int = 8
    num_points: int = 4
    feedforward: int = 1024
    mixed_precision: bool = False  # follow autocast (deformable); the released one stays in float32
