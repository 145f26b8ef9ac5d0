"""Write a Qwen3 checkpoint as GGUF: in bf16, and from that quantized as llama.cpp does it.

Run by the interpreter of the peer's environment (`peers.py`):

    PYTHON benchmarks/convert_gguf.py CHECKPOINT {bf16,q8_0,q4_0} TARGET.gguf

The vocabulary is left out: the harness speaks in token ids. Quantizing is llama.cpp's own, with its
defaults, so that Q4_0 keeps the tied head in Q6_K.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

FTYPES = {"q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def bf16_tensors(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors of a safetensors file as their 16-bit patterns; numpy has no bfloat16."""
    length = int(np.fromfile(file, "<u8", 1)[0])
    with file.open("rb") as stream:
        stream.seek(8)
        header = json.loads(stream.read(length))
    data = np.memmap(file, mode="r", offset=8 + length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise SystemExit(f"{file}: {name} is {entry['dtype']}; only BF16 is converted.")
        start, stop = entry["data_offsets"]
        yield name, data[start:stop].view(np.uint16).reshape(entry["shape"])


def gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[part]}.weight"


def write_bf16(checkpoint: Path, target: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    writer = gguf.GGUFWriter(target, "qwen3")
    writer.add_file_type(llama_cpp.LLAMA_FTYPE_MOSTLY_BF16)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for name, bits in bf16_tensors(checkpoint / "model.safetensors"):
        if bits.ndim == 1:  # norms are wanted in fp32
            wide = (bits.astype(np.uint32) << 16).view(np.float32)
            writer.add_tensor(gguf_name(name), wide)
        else:
            octets = np.ascontiguousarray(bits).view(np.uint8)
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(gguf_name(name), octets, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantize(source: Path, precision: str, target: Path) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FTYPES[precision]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params):
        raise SystemExit(f"llama.cpp did not quantize {source} to {precision}.")


def main() -> None:
    checkpoint, precision, target = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
    partial = target.with_name(target.name + ".partial")
    if precision == "bf16":
        write_bf16(checkpoint, partial)
    else:
        wide = target.with_name(target.name + ".bf16")
        write_bf16(checkpoint, wide)
        quantize(wide, precision, partial)
        wide.unlink()
    partial.rename(target)


if __name__ == "__main__":
    main()
