"""Decoding steps of static addresses, as CUDA graphs hold them: one launch and one copy a step.

    graphs = DecodeGraphs(engine, cuda_capture(device))
    logits = graphs.logits(None, sequences)     # (S, V) behind the next token of each

A decoding step is some hundred small kernels, which the host starts more slowly than the device runs them. A
graph is started as a whole, but it holds addresses, not values: everything that changes from step to step is
read from one table on the device. A graph is captured for each number of sequences (1, 2, 4, 8, ...: what is
left over computes rows that nobody has), each mix of adapters in the batch, and each whole one.

Eager as before: prompts in the stream, an image's place as the next token, several adapters that hold
parameters of the language model whole in one step, tensor parallelism, training's evaluation, plain PyTorch
in place of the kernels, and Flan-T5, whose decoder adds a bias as long as the answer.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

import lora
from kernels.attention import attention_decode
from kernels.dispatch import use_triton
from terminal import one_line
from vlm import Batch, even_segments

Run = Callable[[], None]
MOST = 64  # graphs that are kept; each has its kernels' arguments, of all layers


def cuda_capture(device: torch.device) -> Callable[[Run], Run]:
    """`capture(run)` gives what repeats `run()` on the device: the same kernels on the same addresses."""
    # One pool for all of them: only one runs at a time, and none leaves anything in it for later. One stream,
    # since a library's work area is a stream's.
    memory, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    def capture(run: Run) -> Run:
        # First outside: kernels are compiled, and libraries make their work areas, which a capture forbids.
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            run()
            run()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # A server's other threads may use the device meanwhile.
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            run()
        return graph.replay

    return capture


def capture_for(model: nn.Module) -> Callable[[Run], Run] | None:
    """What captures this model's steps; None where they stay eager."""
    parameter = next(model.parameters())
    alone = not (torch.distributed.is_available() and torch.distributed.is_initialized())
    if parameter.device.type != "cuda" or not alone or model.encoder_decoder:
        return None
    return cuda_capture(parameter.device) if use_triton("auto", parameter) else None


class DeviceRows:
    """The pool as a captured step sees it (engine.KVCache): each token's row, and the range of its keys, are
    numbers on the device, (S,) each."""

    encode = False

    def __init__(self, layers: dict, rows: Tensor, first: Tensor, end: Tensor):
        self.layers, self.rows, self.first, self.end = layers, rows, first, end

    def attend(self, layer, q, k, v, cu_seqlens, prefix_lens=None, bias=None, tuned=None) -> Tensor:
        """What KVCache.attend computes of single queries: whatever its prompt's prefix, one sees all of its
        keys; P-tuning's stand in front of them since the prompt's own pass."""
        buffers = self.layers[layer]
        for buffer, x in zip(buffers, (k, v), strict=True):
            buffer.index_copy_(0, self.rows, x)
        return attention_decode(q, *buffers, self.first, self.end)


class DecodeGraphs:
    """The table of an engine's steps, and the graphs that read it. capture: see cuda_capture; a test gives
    one that needs no GPU."""

    FIELDS = "token row first end length adapter".split()  # then the axes of the position

    def __init__(self, engine: "Engine", capture: Callable[[Run], Run]):  # noqa: F821
        self.engine, self.capture = engine, capture
        self.size = max(16, 1 << (engine.max_running - 1).bit_length())
        shape = len(self.FIELDS) + engine.model.position_axes, self.size
        # Pinned: the device fetches it by itself, and the host goes on.
        self.host = torch.zeros(shape, dtype=torch.int64, pin_memory=engine.device.type == "cuda")
        self.table = self.host.to(engine.device)
        self.numbers = self.host.numpy()  # the same memory
        self.out: Tensor | None = None  # (size, V) fp32, where every graph leaves its logits
        self.graphs: dict[tuple, Run] = {}
        self.layers: dict | None = None  # the pool's buffers whose addresses they hold
        self.names = [None, *engine.adapters]  # a sequence's adapter in the table is its place here

    def logits(self, whole: str | None, sequences: list) -> Tensor | None:
        """(S, V) fp32 behind the next token of each, until the next call; None where it can't be captured.
        `whole` as in Engine.one_pass."""
        count = len(sequences)
        if count > self.size or not self.capture:
            return None
        # A pool that has grown lies elsewhere.
        if self.layers is not self.engine.pool.layers:
            self.graphs.clear()
            self.layers = self.engine.pool.layers
        # Few buckets: a graph is worth its capture only if it is replayed often.
        bucket = 1 << (count - 1).bit_length()
        adapters = self.fill(sequences, bucket)
        key = bucket, whole, adapters
        # The one copy of a step. Its source is written again only after the step's tokens were read.
        self.table.copy_(self.host, non_blocking=True)
        if key not in self.graphs:
            if len(self.graphs) == MOST:
                self.graphs.pop(next(iter(self.graphs)))
            try:
                self.graphs[key] = self.capture(self.step_of(*key))
            except RuntimeError as e:
                print(f"note: no CUDA graphs, decoding stays eager: {one_line(e)}", file=sys.stderr)
                self.capture = None
                return None
        self.graphs[key]()
        return self.out[:count]

    def fill(self, sequences: list, bucket: int) -> tuple[int, ...]:
        """The table's columns of a step; which adapters have rows in it."""
        engine, spare = self.engine, self.engine.pool.size
        fields = len(self.FIELDS)
        columns = []
        for s in sequences:
            row = s.start + engine.pool.before + s.row(s.fed)  # as KVCache counts
            adapter = self.names.index(s.request.adapter)
            columns.append((s.tokens[s.fed], row, s.start, row + 1, s.given, adapter))
        # A slot that nobody has computes too: token 0, in the pool's spare row, which it alone sees. What is
        # left there of a step before would be written into a row that may be another's by now.
        unused = (0, spare, spare, spare + 1, 1, columns[0][-1])
        columns += [unused] * (bucket - len(sequences))
        self.numbers[:fields, :bucket] = list(zip(*columns, strict=True))
        for n, s in enumerate(sequences):
            self.numbers[fields:, n] = s.positions[..., s.fed]
        self.numbers[fields:, len(sequences) : bucket] = 0
        return tuple(sorted({column[-1] for column in columns}))

    def step_of(self, bucket: int, whole: str | None, adapters: tuple[int, ...]) -> Run:
        """The model's pass over the first `bucket` columns of the table, into the first rows of `out`."""
        fields = len(self.FIELDS)
        at = dict(zip(self.FIELDS, self.table[:fields, :bucket], strict=True))
        positions = self.table[fields:, :bucket]
        batch = Batch(
            input_ids=at["token"],
            position_ids=positions if len(positions) > 1 else positions[0],
            cu_seqlens=even_segments(bucket, 1),
            rope_lengths=at["length"],
            single=True,
            cache=DeviceRows(self.layers, at["row"], at["first"], at["end"]),
        )

        def run() -> None:
            # Masks in place of lists of rows, whose lengths would differ from step to step.
            rows = [(self.names[n], (at["adapter"] == n)[:, None]) for n in adapters if n]
            if len(adapters) == 1:
                rows = [(name, None) for name, _ in rows]
            with lora.adapted(rows):
                logits = self.engine.run(whole, batch, "logits")
            if self.out is None:  # before the first capture: its width is the model's own matter
                self.out = logits.new_empty(self.size, logits.shape[1], dtype=torch.float32)
            self.out[:bucket].copy_(logits)

        return run
