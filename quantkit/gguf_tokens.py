"""The tokenizer of a GGUF file, from tokenizer.json: byte-pair encodings, of bytes or of SentencePiece's characters."""

from __future__ import annotations

import json
import re
from typing import Any

from quantkit.decoder import Decoder

_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def add_tokenizer(writer: Any, decoder: Decoder) -> str:
    """Add the tokenizer to a writer; what llama.cpp calls it: "llama", "gpt2", or "none" if there is none it reads.

    "none" runs on token ids. Of SentencePiece encodings a token's score is minus the rank of the merge that makes it,
    so that llama.cpp, which merges what scores highest, merges in the same order.
    """
    file = next((f for f in decoder.files if f.name == "tokenizer.json"), None)
    record = {} if file is None else json.loads(file.read_text(encoding="utf-8"))
    model = record.get("model") or {}
    if model.get("type") != "BPE":
        writer.add_tokenizer_model("none")
        return "none"
    size = int(decoder.config.vocab_size)
    tokens, kinds, scores = [f"[PAD{i}]" for i in range(size)], [_UNUSED] * size, [-1e6] * size
    merges = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
    ranks: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        ranks.setdefault(left + right, rank)
    bytewise = bool(model.get("byte_fallback"))
    for token, i in model["vocab"].items():
        tokens[i], kinds[i], scores[i] = token, _NORMAL, float(-ranks.get(token, len(merges)))
        if bytewise and re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            kinds[i] = _BYTE
    for added in record.get("added_tokens", []):
        tokens[added["id"]], kinds[added["id"]] = added["content"], _CONTROL if added.get("special") else _USER
    if (unknown := model["vocab"].get(model.get("unk_token"))) is not None and bytewise:
        kinds[unknown] = _UNKNOWN
    name = "llama" if bytewise else "gpt2"
    writer.add_tokenizer_model(name)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if bytewise:
        writer.add_token_scores(scores)
        writer.add_add_space_prefix('"Prepend"' in json.dumps(record.get("normalizer")))
    else:
        writer.add_tokenizer_pre(_split(record))
        writer.add_token_merges([" ".join(merge) for merge in merges])
    if (template := _chat_template(decoder)) is not None:
        writer.add_chat_template(template)
    config = decoder.config
    for kind, add in (("bos", writer.add_bos_token_id), ("eos", writer.add_eos_token_id)):
        found = getattr(config, f"{kind}_token_id", None)
        if found is not None:
            add(int(found[0] if isinstance(found, list) else found))
    writer.add_add_bos_token(_starts_with_special(record))
    return name


def _chat_template(decoder: Decoder) -> str | None:
    """The template of a conversation, in a file of its own or in tokenizer_config.json."""
    files = {f.name: f.read_text(encoding="utf-8") for f in decoder.files}
    if (alone := files.get("chat_template.jinja")) is not None:
        return alone
    found = json.loads(files.get("tokenizer_config.json", "{}")).get("chat_template")
    return found if isinstance(found, str) else None


def _split(record: dict[str, Any]) -> str:
    """llama.cpp's name of the pattern that splits text before merging."""
    pattern = json.dumps(record.get("pre_tokenizer"))
    if r"\\p{N}{1,3}" in pattern:
        return "llama-bpe"
    return "qwen2" if r"\\p{N}" in pattern and "Split" in pattern else "gpt-2"


def _starts_with_special(record: dict[str, Any]) -> bool:
    """Whether the tokenizer puts a token of its own in front of a text."""
    processor = record.get("post_processor") or {}
    steps = processor.get("processors", [processor])
    return any("SpecialToken" in step["single"][0] for step in steps if step.get("single"))
