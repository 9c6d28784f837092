"""Running a decoder in onnxruntime: a file of `quantkit.export_nbits`, or any with its inputs and outputs."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from quantkit.errors import InputError, one_line

_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class OnnxDecoder:
    """A decoder in onnxruntime's CPU provider, with its keys and values from one call to the next.

    Raises InputError for a file that onnxruntime cannot load or that is no decoder.
    """

    def __init__(self, path: Path, *, threads: int = 0) -> None:
        """threads: of one operator, 0 for onnxruntime's choice."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 4  # what fails is raised
        if not path.is_file():
            raise InputError(f"{path}: no such file; accepted: model.onnx of quantkit export --to onnx-nbits")
        try:
            self.session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises many types
            raise InputError(f"{path}: onnxruntime cannot load it ({one_line(error)})") from None
        inputs = {i.name: i for i in self.session.get_inputs()}
        self.past = [i for name, i in inputs.items() if name.startswith("past_key_values.")]
        self.facts = dict(self.session.get_modelmeta().custom_metadata_map)
        outputs = [o.name for o in self.session.get_outputs()]
        self.present = [i.name.replace("past_key_values", "present") for i in self.past]
        if not self.past or not {"input_ids", "attention_mask"} <= set(inputs) or not {*self.present} <= set(outputs):
            raise InputError(
                f"{path}: no decoder; accepted: inputs input_ids, attention_mask and past_key_values.N.key and .value, "
                "outputs logits and present.N.key and .value"
            )
        self.reset()

    def reset(self) -> None:
        """Forget all keys and values."""
        self._held: list[ort.OrtValue] = []
        self.length = 0

    def step(self, ids: np.ndarray) -> np.ndarray:
        """Logits (batch, n, vocabulary) of token ids (batch, n) behind what has been fed since `reset`."""
        batch, new = ids.shape
        if not self._held:
            shapes = [(batch, i.shape[1], 0, i.shape[3]) for i in self.past]
            empty = [np.zeros(s, _TYPES[i.type]) for s, i in zip(shapes, self.past, strict=True)]
            self._held = [ort.OrtValue.ortvalue_from_numpy(e) for e in empty]
        self.length += new
        feeds = {"input_ids": ids.astype(np.int64), "attention_mask": np.ones((batch, self.length), np.int64)}
        values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
        values |= {i.name: held for i, held in zip(self.past, self._held, strict=True)}
        logits, *self._held = self.session.run_with_ort_values(["logits", *self.present], values)
        found: np.ndarray = logits.numpy()
        return found

    def generate(
        self,
        prompts: np.ndarray,
        tokens: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        stop: Collection[int] = (),
    ) -> np.ndarray:
        """Prompts (batch, length) with up to `tokens` more, as `quantkit.tasks.generation.generate`: int64.

        temperature 0 takes the likeliest token, above 0 samples from softmax(logits / temperature). It ends early once
        every sequence has made a token of `stop`.
        """
        if prompts.ndim != 2 or 0 in prompts.shape or tokens < 1:
            raise InputError(
                f"prompts of shape {prompts.shape} and {tokens} tokens; accepted: (batch, length), 1 or more"
            )
        if temperature < 0:
            raise InputError(f"temperature={temperature} is negative")
        generator, ended = np.random.default_rng(seed), np.zeros(len(prompts), bool)
        ids = prompts.astype(np.int64)
        self.reset()
        logits = self.step(ids)[:, -1]
        for count in range(1, tokens + 1):
            chosen = _chosen(logits, temperature, generator)
            ids = np.concatenate([ids, chosen[:, None]], axis=1)
            ended |= np.isin(chosen, list(stop))
            if ended.all() or count == tokens:
                break
            logits = self.step(chosen[:, None])[:, -1]
        return ids


def _chosen(logits: np.ndarray, temperature: float, generator: np.random.Generator) -> np.ndarray:
    """One token id a row, (batch,)."""
    if temperature == 0:
        likeliest: np.ndarray = logits.argmax(axis=1)
        return likeliest
    scaled = logits.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    return np.array([generator.choice(len(w), p=w / w.sum()) for w in weights])


def continued(path: Path, prompt: str, tokens: int, *, temperature: float = 0.0, seed: int = 0) -> dict[str, Any]:
    """A prompt and what the decoder makes of it: text, prompt_tokens, tokens (made) and seconds.

    The tokenizer and the end tokens (`hf.end_tokens`) are those of the files beside it. It ends at an end
    token, at `tokens` tokens or at the context. Raises InputError for a prompt of no token, or one that leaves no room.
    """
    from quantkit.loaders.hf import end_tokens, read_tokenizer

    tokenizer = read_tokenizer(path.parent)
    config = _config(path.parent / "config.json")
    decoder = OnnxDecoder(path)
    ids = np.array([tokenizer.encode(prompt).ids], np.int64)
    room = int(config.get("max_position_embeddings", config.get("n_positions", 2**31))) - ids.shape[1]
    if ids.shape[1] == 0:
        raise InputError("the prompt has no token; give a text to go on from")
    if room < 1:
        raise InputError(f"the prompt has {ids.shape[1]} tokens, which leaves no room in the decoder's context")
    if int(ids.max()) >= int(config["vocab_size"]):
        raise InputError(f"the tokenizer gives the id {ids.max()}, the decoder has {config['vocab_size']} tokens")
    stop = end_tokens(path.parent, config)
    began = time.perf_counter()
    made = decoder.generate(ids, min(tokens, room), temperature=temperature, seed=seed, stop=stop)
    seconds = time.perf_counter() - began
    count = made.shape[1] - ids.shape[1]
    text = tokenizer.decode(made[0].tolist())
    return {"text": text, "prompt_tokens": ids.shape[1], "tokens": count, "seconds": seconds}


def _config(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        int(record["vocab_size"])
    except FileNotFoundError:
        raise InputError(f"{file}: missing; it stands beside the file that quantkit export wrote") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise InputError(f"{file}: cannot be read as a configuration") from None
    return record
