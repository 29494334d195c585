"""The model card of an export, README.md: what it is, what was measured, how it is run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, Protocol

from splitq_edge.artifacts import read_export
from splitq_edge.report.quality_report import REPORT_FILE, read_report

CARD_FILE = "README.md"


class Compared(Protocol):
    """One output of ONNX Runtime beside torch's, see `splitq_edge.runtime_ops.verify.ParityRow`."""

    @property
    def part(self) -> str:
        """Graph and sample."""

    @property
    def output(self) -> str:
        """Name of the output."""

    @property
    def max_error(self) -> float:
        """Largest absolute difference."""

    @property
    def sqnr_db(self) -> float:
        """Signal over difference in dB."""

    @property
    def same_top(self) -> float:
        """Share of rows whose largest entry is at the same place."""


def model_card(folder: Path, parity: Sequence[Compared]) -> str:
    """Text of the card.

    Args:
        folder: finished export.
        parity: its outputs, compared with torch's here.

    Raises:
        SplitQError: the folder is not a whole export.
    """
    manifest = read_export(folder)
    sections = [_front(manifest), _title(manifest), _files(manifest)]
    if (folder / REPORT_FILE).is_file():
        sections.append(_quality(read_report(folder)))
    sections += [_parity(parity), _use(manifest)]
    return "\n\n".join(sections) + "\n"


def _front(manifest: dict[str, Any]) -> str:
    quantized = manifest["scheme"] != "none"
    lines = [
        f"base_model: {manifest['base_model']}",
        *(["base_model_relation: quantized"] if quantized else []),
        "library_name: onnx",
        "pipeline_tag: image-text-to-text",
        "tags:",
        "- onnx",
        *(["- splitq", f"- {manifest['scheme']}"] if quantized else []),
    ]
    return "\n".join(["---", *lines, "---"])


def _title(manifest: dict[str, Any]) -> str:
    name, scheme, base = manifest["source"], manifest["scheme"], manifest["base_model"]
    if scheme == "none":
        return f"# {name}\n\n{base} as float32 ONNX graphs, written by splitq-edge {manifest['splitq_edge']}."
    calibration = manifest["calibration"]
    rest = (
        "the other linear layers in INT8"
        if manifest["flavour"] == "qdq"
        else f"vision encoder {manifest['vision']['scheme']}, output projection {manifest['lm_head']['scheme']} "
        "(none: float32)"
    )
    return (
        f"# {name}, {scheme}\n\n"
        f"{base} as ONNX graphs, quantized by splitq-edge {manifest['splitq_edge']}: method {manifest['method']}, "
        f"{manifest['effective_bits']:.2f} stored bits a weight in the linear layers of the language model, {rest}. "
        f"Calibrated on {calibration['samples']} samples of {calibration['source']}."
    )


def _files(manifest: dict[str, Any]) -> str:
    sizes = {name: entry["bytes"] for name, entry in manifest["files"].items()}
    rows = []
    for part, entry in manifest["parts"].items():
        size = sum(count for name, count in sizes.items() if name.startswith(entry["file"]))
        rows.append((part, f"`{entry['file']}`", f"{size / 1e6:.2f} MB"))
    return _table(("part", "file", "with its data"), rows)


def _quality(report: dict[str, Any]) -> str:
    sites = [site for block in report["blocks"] for site in block["sites"].values()]
    rows = []
    for index, modality in enumerate(("text", "vision")):
        values = [site["sqnr_db"]["final"][index] for site in sites if site["sqnr_db"]["final"][index] is not None]
        if values:
            rows.append((modality, f"{mean(values):.1f}", f"{min(values):.1f}"))
    title = "SQNR in dB of the quantized layers' outputs over the calibration rows, against float32:"
    return f"{title}\n\n{_table(('rows', 'mean', 'worst layer'), rows)}"


def _parity(parity: Sequence[Compared]) -> str:
    rows = [
        (row.part, row.output, f"{row.max_error:.1e}", f"{row.sqnr_db:.1f}", f"{100 * row.same_top:.1f} %")
        for row in parity
    ]
    title = "ONNX Runtime against torch on the samples in `parity.npz` (`splitq-edge verify` repeats it):"
    return f"{title}\n\n{_table(('sample', 'output', 'largest error', 'SQNR dB', 'same top-1'), rows)}"


def _use(manifest: dict[str, Any]) -> str:
    lines = ["    splitq-edge run FOLDER --image PICTURE --prompt QUESTION"]
    if manifest["layout"] == "genai":
        lines += ["", _genai(manifest)]
    if manifest["layout"] == "onnx-community":
        lines += ["", "transformers.js loads the folder: `AutoModelForImageTextToText.from_pretrained(folder)`."]
    return "\n".join(lines)


def _genai(manifest: dict[str, Any]) -> str:
    engine = manifest["genai"]
    text = "onnxruntime-genai opens the folder: `onnxruntime_genai.Model(folder)`."
    if engine["borrowed"]:
        text += (
            f" It does not know {manifest['model_type']} and runs the graphs under the type {engine['type']}, whose "
            "parts are the same: give it `input_ids`, `pixel_values` and `num_image_tokens` as named tensors, made by "
            "the processor in this folder; its own picture processor makes those of another model."
        )
    return text


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
