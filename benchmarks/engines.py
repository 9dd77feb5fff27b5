"""Engines that serve a language model, asked alike: times, and what they expect of a text.

`openvino` is no part of the project: requirements-benchmarks.txt installs it.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from companion.cli.bench import times

INSTALL = "pip install --no-deps --requirement requirements-benchmarks.txt"


VOCABULARY = 1_000_000
"""More tokens than there are: all of them are asked for."""


class Engine(Protocol):
    """A served language model."""

    def times(self, ids: Tensor, tokens: int) -> tuple[float, float]:
        """Seconds for a prompt of shape (1, n), and for each of the tokens after it."""

    def log_probabilities(self, ids: Sequence[int], first: int) -> np.ndarray:
        """What is expected at each place of a text from `first` on, shape (n - first, vocabulary)."""


class TorchEngine:
    """A model of transformers, or an `OnnxModel`: everything with logits.

    Parameters
    ----------
    model : nn.Module
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def times(self, ids: Tensor, tokens: int) -> tuple[float, float]:
        return times(self.model, ids, tokens)

    @torch.no_grad()
    def log_probabilities(self, ids: Sequence[int], first: int) -> np.ndarray:
        text = torch.tensor([ids])
        logits = self.model(input_ids=text, attention_mask=torch.ones_like(text)).logits
        return logits[0, first - 1 : -1].log_softmax(-1).numpy()


class LlamaCpp:
    """A GGUF file in llama.cpp, through the server that xllamacpp runs in this process.

    Parameters
    ----------
    file : path
    threads : int
    context : int
        Most tokens of a text.
    """

    def __init__(self, file: str | Path, threads: int, context: int = 1024) -> None:
        import xllamacpp

        options = xllamacpp.CommonParams()
        options.model.path = str(file)
        options.n_ctx, options.n_parallel, options.verbosity = context, 1, 0
        options.n_batch = options.n_ubatch = 512
        options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
        self._server = xllamacpp.Server(options)

    def _complete(self, ids: Sequence[int], tokens: int, **more) -> dict:
        return self._server.handle_completions(
            {"prompt": list(ids), "max_tokens": tokens, "temperature": 0.0} | more
        )

    def times(self, ids: Tensor, tokens: int) -> tuple[float, float]:
        """By the engine's own clock, without the text around it; the first token is the prompt's."""
        found = self._complete(ids[0].tolist(), tokens + 1, ignore_eos=True, cache_prompt=False)
        clock = found["timings"]
        if clock["prompt_n"] != ids.shape[1] or clock["predicted_n"] != tokens + 1:
            raise RuntimeError(f"llama.cpp timed something else than it was asked for: {clock}")
        return clock["prompt_ms"] / 1e3, clock["predicted_ms"] / 1e3 / tokens

    def log_probabilities(self, ids: Sequence[int], first: int) -> np.ndarray:
        """One request for each place, which goes on from the keys and values of the last one."""
        places = range(first, len(ids))
        return np.stack([self._next(ids[:place]) for place in places])

    def _next(self, ids: Sequence[int]) -> np.ndarray:
        found = self._complete(ids, 1, cache_prompt=True, logprobs=VOCABULARY)
        listed = found["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        told = np.full(max(token["id"] for token in listed) + 1, -np.inf, dtype=np.float32)
        told[[token["id"] for token in listed]] = [token["logprob"] for token in listed]
        return told


class OpenVino:
    """A file of `export_onnx` in OpenVINO.

    Parameters
    ----------
    file : path
    threads : int
    """

    def __init__(self, file: str | Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        file = Path(file)
        readable = file.with_suffix(".heads.onnx")
        onnx.save(as_openvino_reads_it(onnx.load(file)), readable)
        try:
            self._model = core.compile_model(
                str(readable), "CPU",
                {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"},
            )  # fmt: skip
        finally:
            readable.unlink()
        self._names = [place.get_any_name() for place in self._model.inputs]
        self._outputs = [place.get_any_name() for place in self._model.outputs]
        self._request = self._model.create_infer_request()
        shape = self._model.input("past_key_values.0.key").get_partial_shape()
        self._heads, self._width = shape[1].get_length(), shape[3].get_length()

    def _run(self, ids: np.ndarray, past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict]:
        before = past["past_key_values.0.key"].shape[2]
        mask = np.ones((1, before + ids.shape[1]), dtype=np.int64)
        found = self._request.infer({"input_ids": ids, "attention_mask": mask} | past)
        answers = {name: found[name] for name in self._outputs}
        new = {name.replace("present", "past_key_values"): x.copy()
               for name, x in answers.items() if name != "logits"}  # fmt: skip
        return answers["logits"], new

    def _nothing(self) -> dict[str, np.ndarray]:
        empty = np.zeros((1, self._heads, 0, self._width), dtype=np.float32)
        return {name: empty for name in self._names if name.startswith("past")}

    def times(self, ids: Tensor, tokens: int) -> tuple[float, float]:
        text, past, stamps = ids.numpy(), self._nothing(), [time.perf_counter()]
        for _ in range(tokens + 1):
            logits, past = self._run(text, past)
            text = np.array([[logits[0, -1].argmax()]])
            stamps.append(time.perf_counter())
        return stamps[1] - stamps[0], (stamps[-1] - stamps[1]) / tokens

    def log_probabilities(self, ids: Sequence[int], first: int) -> np.ndarray:
        logits, _ = self._run(np.array([ids]), self._nothing())
        return torch.from_numpy(logits[0, first - 1 : -1].copy()).log_softmax(-1).numpy()


def as_openvino_reads_it(model: onnx.ModelProto) -> onnx.ModelProto:
    """Repeat keys and values for every head, and store an embedding's integers in their last shape.

    OpenVINO's reader takes keys and values for one each of every head, and reads no integers of a
    GatherBlockQuantized through another operator.

    Parameters
    ----------
    model : onnx.ModelProto
        A decoder from `export_onnx`; it is changed.
    """
    graph = model.graph
    keys = next(x for x in graph.input if x.name == "past_key_values.0.key").type.tensor_type
    kept, width = keys.shape.dim[1].dim_value, keys.shape.dim[3].dim_value
    heads = max(a.i for node in graph.node for a in node.attribute if a.name == "num_heads")
    stored = {tensor.name: tensor for tensor in graph.initializer}
    views = {node.output[0]: node.input[0] for node in graph.node
             if node.op_type == "Reshape" and node.input[0] in stored}  # fmt: skip
    shapes = {"axis": [2], "times": [1, 1, heads // kept, 1, 1], "shape": [0, heads, -1, width]}
    graph.initializer.extend(
        numpy_helper.from_array(np.array(value, dtype=np.int64), f"heads.{name}")
        for name, value in shapes.items()
    )
    nodes = []
    for node in graph.node:
        if node.op_type == "GatherBlockQuantized" and node.input[0] in views:
            integers = numpy_helper.to_array(stored[views[node.input[0]]])
            rows = integers.reshape(len(integers), -1)
            graph.initializer.append(numpy_helper.from_array(rows, f"{node.input[0]}.rows"))
            node.input[0] = f"{node.input[0]}.rows"
        if node.op_type == "Attention":
            for place in (1, 2):
                x = node.input[place]
                steps = (("Unsqueeze", "axis"), ("Expand", "times"), ("Reshape", "shape"))
                for step, told in steps:
                    y = f"{node.name}.{place}.{step}"
                    nodes.append(helper.make_node(step, [x, f"heads.{told}"], [y]))
                    x = y
                node.input[place] = x
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def write_gguf(source: str | Path, target: str | Path, kind: str, embedding: str) -> Path:
    """Write a GGUF file with the matrices of another one in another type.

    Parameters
    ----------
    source, target : path
    kind, embedding : str
        Type of the matrices, and of the token embedding, such as ``"Q4_0"``.
    """
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)
    types, reader = gguf.GGMLQuantizationType, gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name in ("general.architecture", "general.file_type"):
            continue
        part = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], part)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    for tensor in reader.tensors:
        values, wanted = tensor.data, tensor.tensor_type
        if len(tensor.shape) > 1:
            wanted = types[embedding if "embd" in tensor.name else kind]
            floats = gguf.quants.dequantize(values, tensor.tensor_type)
            values = gguf.quants.quantize(floats, wanted)
        writer.add_tensor(tensor.name, values, raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(target)


def matrix_bytes(file: str | Path) -> int:
    """What a GGUF file's matrices take: read once for each token, the embedding as the output."""
    import gguf

    return sum(int(x.n_bytes) for x in gguf.GGUFReader(file).tensors if len(x.shape) > 1)


def llama_build() -> str:
    """What the installed llama.cpp was compiled for, in its own words."""
    import xllamacpp

    return re.sub(r"\s+", " ", xllamacpp.get_system_info()).strip()
