"""A tiny Llama that answers associative recall, on which damage to keys and values shows: its weights are set by formula, then trained a little.

Layer 0 has a head that attends to the token before (12 fast rotary pairs, whose phases agree at distance 1) and writes its key code where a value
stands; layer 1 has one that asks for a key code (18 slow pairs, for content must survive rotation) and copies the value's code to the output.
Only one head per layer is of use, so what is right here of methods beside each other is a relation, not a figure for real models.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor

from compress.evaluate.retrieval import BOS, KEYS, SEP, VALUES

WEIGHTS = Path(__file__).with_name("recall.safetensors")
"""Made by ``scripts/train_recall.py``, bfloat16."""
WIDTH, HEAD, THETA, CODE = 160, 64, 1e6, 36
PAIRS = HEAD // 2
CONSTANT = 0
KEY, VALUE, BEFORE, OUT = (slice(1 + CODE * index, 1 + CODE * (index + 1)) for index in range(4))
"""Where of the residual stream the code of a key token stands, that of a value token, that of the token before, and what was found."""
PAD, UNKNOWN = 2, 3
VOCABULARY = VALUES.stop
CHANCE = 1 / len(VALUES)


def config(dtype: torch.dtype = torch.float32) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=HEAD, max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": THETA}, tie_word_embeddings=False,
        bos_token_id=BOS, eos_token_id=PAD, pad_token_id=PAD, dtype=dtype,
    )  # fmt: skip


@torch.no_grad()
def constructed(seed: int = 0) -> Any:
    """The model of transformers as the formula has it, float32, untrained.

    BOS and SEP, which have no code, are louder than other tokens behind a norm, so that the two pairs behind BOS are missed: what training mends.
    """
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config()).eval()
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=0.08 / math.sqrt(parameter.shape[1]), generator=generator)
    codes = torch.randn(2, len(KEYS), CODE, generator=generator)
    keys, values = codes / codes.norm(dim=-1, keepdim=True)
    # What a norm multiplies a token of energy 2² + 3² by.
    gain = math.sqrt(WIDTH / 13)

    table = model.model.embed_tokens.weight
    table[:, CONSTANT] = 2
    table[KEYS.start : KEYS.stop, KEY] = 3 * keys
    table[VALUES.start : VALUES.stop, VALUE] = 3 * values
    first, second = (layer.self_attn for layer in model.model.layers)
    copy = torch.eye(CODE)

    angles = THETA ** (-torch.arange(PAIRS) / PAIRS)
    sharpness, fast = 7 / gain, slice(0, 12)
    first.k_proj.weight[:12, CONSTANT] = sharpness
    for head in range(2):
        rows = first.q_proj.weight[HEAD * head : HEAD * (head + 1)]
        rows[:12, CONSTANT] = sharpness * angles[fast].cos()
        rows[PAIRS : PAIRS + 12, CONSTANT] = -sharpness * angles[fast].sin()
        first.o_proj.weight[BEFORE, HEAD * head : HEAD * head + CODE] = copy
    first.v_proj.weight[:CODE, KEY] = copy

    slow = torch.cat([torch.arange(PAIRS - CODE // 2, PAIRS), torch.arange(HEAD - CODE // 2, HEAD)])
    # What stands before a value has energy (2·3·gain)² beside its 13, and a match shall give a logit of 30.
    written = 6 * gain
    told, asked = written * math.sqrt(WIDTH / (13 + written**2)), 3 * gain
    match = math.sqrt(30 * math.sqrt(HEAD) / (told * asked))
    second.k_proj.weight[slow, BEFORE] = match * copy
    for head in range(2):
        second.q_proj.weight[HEAD * head + slow, KEY] = match * copy
        second.o_proj.weight[OUT, HEAD * head : HEAD * head + CODE] = 3 * copy
    second.v_proj.weight[:CODE, VALUE] = copy
    model.lm_head.weight[VALUES.start : VALUES.stop, OUT] = 4 * values
    return model


def trained(dtype: torch.dtype = torch.float32) -> Any:
    """The model of transformers with the weights that ship."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(config(dtype)).eval()
    model.load_state_dict(load_file(WEIGHTS))
    return model.to(dtype)


def tokenizer() -> Any:
    """A tokenizer of whole words: ``<bos>``, ``<sep>``, ``k0`` to ``k127`` and ``v0`` to ``v127``."""
    from transformers import PreTrainedTokenizerFast

    special = {"<bos>": BOS, "<sep>": SEP, "<pad>": PAD, "<unk>": UNKNOWN}
    unused = {f"<{index}>": index for index in range(len(special), KEYS.start)}
    words = {f"{letter}{index - ids.start}": index for letter, ids in (("k", KEYS), ("v", VALUES)) for index in ids}
    plain = Tokenizer(models.WordLevel(special | unused | words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"bos_token": "<bos>", "eos_token": "<pad>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=plain, **names)


def save(folder: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write the trained model as a checkpoint, with its tokenizer."""
    trained(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _of_answers(logits: Tensor, sequences: Tensor, scored: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [answers, vocabulary] and labels [answers]: what is said at a place is of the token after it."""
    wanted = scored[:, 1:]
    return logits[:, :-1][wanted].float(), sequences[:, 1:][wanted]


def accuracy(logits: Tensor, sequences: Tensor, scored: Tensor) -> float:
    """Share of the `scored` tokens (bool [sequences, tokens]) of `sequences` (int64, the same shape) that are the likeliest by `logits`
    (floats [sequences, tokens, vocabulary])."""
    said, labels = _of_answers(logits, sequences, scored)
    return float((said.argmax(-1) == labels).double().mean())


def cross_entropy(logits: Tensor, sequences: Tensor, scored: Tensor) -> float:
    """Mean over the same tokens of the negative log-likelihood, nats."""
    said, labels = _of_answers(logits, sequences, scored)
    return torch.nn.functional.cross_entropy(said.double(), labels).item()
