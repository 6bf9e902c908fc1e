"""llama.cpp by llama-cpp-python's low level: Q8_0 weights, q8_0 cache, continuous batching as its server does it.

Each step decodes one token of every running sequence and up to a physical batch of prompt tokens. FOLDER is that of the
gguf file, which `prepare` writes with the gguf package from the bf16 checkpoint.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path

from protocol import SteppedPeer, main

CONTEXT, SEQUENCES, CHUNK = 16_384, 32, 512
FILE, NO_TILES = "model-q8_0.gguf", "no-tiles"


def prepare(source: str, target: str) -> None:
    """SOURCE: bf16 safetensors. Rows of q and k are put into the order of this file format's rope."""
    import gguf
    import numpy as np

    config = json.loads((Path(source) / "config.json").read_text())
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    Path(target).mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(Path(target) / FILE), "llama")
    write_config(writer, config)
    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    outer = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    for name, array in bf16_tensors(Path(source) / "model.safetensors"):
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            stem = f"blk.{layer}.{names[part]}"
            if part.endswith(("q_proj", "k_proj")):
                count = heads if part.endswith("q_proj") else kv_heads
                array = array.reshape(count, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        else:
            stem = outer[stem]
        if array.ndim == 1:
            writer.add_tensor(f"{stem}.weight", array.astype(np.float32))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{stem}.weight", gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    try_tiles(Path(target))


def try_tiles(folder: Path) -> None:
    """Some compilers break its AMX products: the process dies in the first. If so, the folder says to do without."""
    code = f"from drive_llama import Llama; Llama({str(folder)!r}, 1).prompt(8)"
    tried = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, check=False)
    if tried.returncode:
        (folder / NO_TILES).touch()
        print(f"llama.cpp ends with {tried.returncode} in its own weight layouts (AMX): going without", file=sys.stderr)


def write_config(writer: object, config: dict) -> None:
    import gguf

    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("no_vocab")  # token ids alone


def bf16_tensors(path: Path):
    """(name, float32 array) of each tensor, read without torch."""
    import numpy as np

    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            file.seek(8 + size + first)
            words = np.frombuffer(file.read(last - first), dtype=np.uint16)
            yield name, (words.astype(np.uint32) << 16).view(np.float32).reshape(entry["shape"])


class Llama(SteppedPeer):
    room = CONTEXT

    def __init__(self, folder: str, threads: int) -> None:
        super().__init__()
        import llama_cpp as lib

        self._lib = lib
        lib.llama_backend_init()
        weights = lib.llama_model_default_params()
        weights.use_extra_bufts = not (Path(folder) / NO_TILES).exists()
        self._model = lib.llama_model_load_from_file(str(Path(folder) / FILE).encode(), weights)
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = CONTEXT, 2048, CHUNK, SEQUENCES
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = lib.GGML_TYPE_Q8_0
        if hasattr(params, "kv_unified"):
            params.kv_unified = True
        if hasattr(params, "flash_attn_type"):
            params.flash_attn_type = 1  # a quantised V needs it
        else:
            params.flash_attn = True
        self._context = lib.llama_init_from_model(self._model, params)
        if not self._model or not self._context:
            raise RuntimeError("llama.cpp did not load the model")
        self._vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(self._model))
        self._tokens = lib.llama_batch_init(2048, 0, 1)
        self._slots = list(range(SEQUENCES))
        self._next = 0
        self._living: dict[int, Sequence] = {}
        self.engine = self

    def add(self, prompt: list[int], output: int) -> int:
        self._next += 1
        self._living[self._next] = Sequence(prompt, output)
        return self._next

    def step(self) -> list[tuple[int, int, bool]]:
        batch, asked, room = self._tokens, [], CHUNK
        batch.n_tokens = 0
        ordered = sorted(self._living.items(), key=lambda pair: len(pair[1].todo) > 1)
        for name, seq in ordered:
            if seq.slot < 0:
                if not self._slots:
                    continue
                seq.slot = self._slots.pop()
            part = seq.todo[: max(0, room)]
            room -= len(part)
            for token in part:
                self._put(token, seq)
            del seq.todo[: len(part)]
            if part and not seq.todo:
                batch.logits[batch.n_tokens - 1] = 1
                asked.append((name, seq, batch.n_tokens - 1))
        if self._lib.llama_decode(self._context, batch) != 0:
            raise RuntimeError("llama_decode failed")
        return [self._take(name, seq, row) for name, seq, row in asked]

    def _put(self, token: int, seq: Sequence) -> None:
        batch, at = self._tokens, self._tokens.n_tokens
        batch.token[at], batch.pos[at], batch.n_seq_id[at] = token, seq.position, 1
        batch.seq_id[at][0], batch.logits[at] = seq.slot, 0
        batch.n_tokens += 1
        seq.position += 1

    def _take(self, name: int, seq: Sequence, row: int) -> tuple[int, int, bool]:
        import numpy as np

        logits = self._lib.llama_get_logits_ith(self._context, row)
        address = ctypes.cast(logits, ctypes.POINTER(ctypes.c_float))
        seq.todo.append(int(np.ctypeslib.as_array(address, shape=(self._vocab,)).argmax()))
        seq.left -= 1
        if not seq.left:
            self._drop(name)
        return name, 1, not seq.left

    def _drop(self, name: int) -> None:
        seq = self._living.pop(name)
        if seq.slot >= 0:
            self._lib.llama_memory_seq_rm(self._lib.llama_get_memory(self._context), seq.slot, -1, -1)
            self._slots.append(seq.slot)

    def cancel(self, names: list[int]) -> None:
        for name in names:
            self._drop(name)


class Sequence:
    def __init__(self, prompt: list[int], output: int) -> None:
        self.todo = list(prompt)
        self.left = output
        self.slot = -1
        self.position = 0


if __name__ == "__main__":
    main(Llama, prepare=prepare)
