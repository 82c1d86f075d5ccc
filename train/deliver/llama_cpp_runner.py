"""llama.cpp, through llama-cpp-python's bindings: tokenises, computes logits, answers and quantises. On the CPU."""

import ctypes
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from train.deliver.optional import package
from train.run.exits import ExitCode, ExitWith

MAX_BATCH = 512  # tokens computed at once; llama.cpp holds their logits, 0.26 GB at 128,000 tokens
COMPLAINTS = (3, 4)  # GGML_LOG_LEVEL_WARN and _ERROR
WHOLE_CACHE = 0  # GGML_TYPE_F32


class LlamaCpp:
    """A GGUF file in llama.cpp, with an adapter if `adapter` is given; close it, or use it in `with`.

    Answers are greedy, of at most `max_new_tokens`, and end before any of `end_token_ids`. With `is_exact` attention
    is computed in fp32; served, it is in fp16. Raises ExitWith(BAD_INPUT) for a file that llama.cpp does not load.
    """

    def __init__(
        self,
        path: Path,
        end_token_ids: Sequence[int] = (),
        max_new_tokens: int = 64,
        adapter: Path | None = None,
        is_exact: bool = False,
    ) -> None:
        self.end_token_ids, self.max_new_tokens = set(end_token_ids), max_new_tokens
        self.is_exact = is_exact
        self.vocabulary = LlamaCppVocabulary(path, vocabulary_only=False)
        self._adapter = None
        if adapter is not None:
            api, model = self.vocabulary.api, self.vocabulary.model
            with self.vocabulary.heard() as said:
                self._adapter = api.llama_adapter_lora_init(model, os.fsencode(adapter))
            if not self._adapter:
                self.close()
                raise _refused(adapter, said)

    def __enter__(self) -> "LlamaCpp":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the model, and with it its adapter."""
        self.vocabulary.close()

    def logits(self, ids: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Ids [T] -> fp32 logits [len(positions), V] at these positions of the row, in host memory."""
        with self._context(len(ids)) as context:
            return torch.from_numpy(self._decode(context, ids, 0, positions))

    def answer(self, prompt: Sequence[int]) -> list[int]:
        """The ids of the greedy answer, without its end token."""
        answer: list[int] = []
        with self._context(len(prompt) + self.max_new_tokens) as context:
            step, position = list(prompt), 0
            while len(answer) < self.max_new_tokens:
                token = int(self._decode(context, step, position, [len(step) - 1])[0].argmax())
                if token in self.end_token_ids:
                    break
                answer.append(token)
                position, step = position + len(step), [token]
        return answer

    @contextmanager
    def _context(self, length: int) -> Iterator[Any]:
        api = self.vocabulary.api
        settings = api.llama_context_default_params()
        settings.n_ctx = max(64, length)
        settings.n_batch = settings.n_ubatch = min(MAX_BATCH, settings.n_ctx)
        settings.n_threads = settings.n_threads_batch = torch.get_num_threads()
        settings.no_perf = True
        if self.is_exact:
            settings.type_k = settings.type_v = WHOLE_CACHE
            settings.flash_attn_type = 0  # LLAMA_FLASH_ATTN_TYPE_DISABLED: it rounds to fp16
        with self.vocabulary.heard() as said:
            context = api.llama_init_from_model(self.vocabulary.model, settings)
        if not context:
            raise _refused(self.vocabulary.path, said)
        try:
            if self._adapter is not None:
                adapters = (api.llama_adapter_lora_p_ctypes * 1)(self._adapter)
                api.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
            yield context
        finally:
            api.llama_free(context)

    def _decode(self, context: Any, ids: Sequence[int], start: int, positions: Sequence[int]) -> np.ndarray:
        """Logits at these positions among the ids, fp32 [len(positions), V]; llama.cpp computes no others."""
        api, size = self.vocabulary.api, self.vocabulary.size
        logits = np.empty((len(positions), size), np.float32)
        for begin in range(0, len(ids), MAX_BATCH):
            part = ids[begin : begin + MAX_BATCH]
            rows = [(row, at - begin) for row, at in enumerate(positions) if 0 <= at - begin < len(part)]
            batch = api.llama_batch_init(len(part), 0, 1)
            batch.n_tokens = len(part)
            for i, token in enumerate(part):
                batch.token[i], batch.pos[i] = token, start + begin + i
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
                batch.logits[i] = False
            for _, i in rows:
                batch.logits[i] = True
            code = api.llama_decode(context, batch)
            api.llama_batch_free(batch)
            if code:
                raise RuntimeError(f"llama_decode of {self.vocabulary.path} returned {code}")
            for row, i in rows:
                logits[row] = np.ctypeslib.as_array(api.llama_get_logits_ith(context, i), (size,))
        return logits


class LlamaCppVocabulary:
    """A GGUF file's tokenizer in llama.cpp; of a file without weights with `vocabulary_only`."""

    def __init__(self, path: Path, vocabulary_only: bool = True) -> None:
        self.path = path
        self.api: Any = _bindings()
        settings = self.api.llama_model_default_params()
        settings.vocab_only = vocabulary_only
        settings.n_gpu_layers = 0
        settings.use_extra_bufts = False  # repacked for AMX, they crashed a virtual machine
        with self.heard() as said:
            self.model = self.api.llama_model_load_from_file(os.fsencode(path), settings)
        if not self.model:
            raise _refused(path, said)
        self._vocabulary = self.api.llama_model_get_vocab(self.model)
        self.size = int(self.api.llama_vocab_n_tokens(self._vocabulary))

    def __enter__(self) -> "LlamaCppVocabulary":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees it."""
        if self.model:
            self.api.llama_model_free(self.model)
            self.model = None

    def tokenize(self, text: str, is_prompt: bool = False) -> list[int]:
        """The text's ids, special tokens spelled in it included; of a prompt with BOS where the file says so."""
        raw = text.encode()
        room = 3 * len(raw) + 8  # a space may become the three bytes of ▁
        ids = (self.api.llama_token * room)()
        count = self.api.llama_tokenize(self._vocabulary, raw, len(raw), ids, room, is_prompt, True)
        assert count >= 0, "more tokens than bytes"
        return list(ids[:count])

    def ends_answers(self, token: int) -> bool:
        """Whether llama.cpp ends an answer with this token."""
        return bool(self.api.llama_vocab_is_eog(self._vocabulary, token))

    @contextmanager
    def heard(self) -> Iterator[list[str]]:
        """Collects what llama.cpp warns of, which it would print."""
        with _heard(self.api) as said:
            yield said


def quantize(source: Path, target: Path, kind: str) -> list[str]:
    """Quantises an F16 or F32 file by llama.cpp's own quantiser.

    Returns what it fell back from: K-quants want rows of a multiple of 256. Raises ExitWith(BAD_INPUT).
    """
    api = _bindings()
    settings = api.llama_model_quantize_default_params()
    settings.ftype = getattr(api, f"LLAMA_FTYPE_MOSTLY_{kind}")
    settings.nthread = torch.get_num_threads()
    with _heard(api) as said:
        code = api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(settings))
    if code:
        raise _refused(source, said)
    return _fallbacks(target, kind)


def _fallbacks(path: Path, kind: str) -> list[str]:
    """How many tensors of a file in K-quants are of other types, and of which."""
    gguf = package("gguf")
    counts: dict[str, int] = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.tensor_type.name
        if len(tensor.shape) > 1 and "_K" in kind and "_K" not in name:
            counts[name] = counts.get(name, 0) + 1
    return [f"{count} tensors are {name}: their rows are no multiple of 256" for name, count in sorted(counts.items())]


@cache
def _bindings() -> Any:
    """The module of the C functions; raises ExitWith(BAD_INPUT) where it is not installed."""
    api: Any = package("llama_cpp.llama_cpp")
    api.llama_backend_init()
    return api


@contextmanager
def _heard(api: Any) -> Iterator[list[str]]:
    said: list[str] = []

    def hear(level: int, text: bytes, _: object) -> None:
        if level in COMPLAINTS:
            said.append(text.decode(errors="replace").strip())

    listener = api.llama_log_callback(hear)
    api.llama_log_set(listener, None)
    try:
        yield said
    finally:
        api.llama_log_set(_deaf(), None)


@cache
def _deaf() -> Any:
    """A listener that does nothing. llama.cpp keeps it, so it must not be freed."""
    return _bindings().llama_log_callback(lambda level, text, data: None)


def _refused(path: Path, said: Sequence[str]) -> ExitWith:
    reason = "; ".join(line for line in said if line)[-600:] or "it does not say why"
    return ExitWith(ExitCode.BAD_INPUT, f"{path}: llama.cpp refuses it: {reason}")
