"""Everything that is timed on one accelerator, in one call: a JSON file and a Markdown table beside it.

python benchmarks/gpu.py [--only queue clipcap] [--out benchmarks/results/gpu.json] [--minutes 9.5]
    needs JAX, Flax, Optax, jaxtyping, Pillow, rich and safetensors alone; with PyTorch and transformers installed it
    times the same work there, compiled. Sections: rates (copy and matmul peaks, always first), queue (loss and
    gradient against N keys), clipcap (ClipCap-EIM's stages, ViT-B/32 + GPT-2 small), decode (captions), lavin
    (LaVIN-7B's stages at 512 slots, bfloat16 and NF4), lavin_torch. Planned for an H200 in ten minutes: rates 0.5,
    queue 1.5, clipcap 3.5, decode 1, lavin 2, lavin_torch 1. Every row is written as soon as it is there; what does not
    fit into --minutes is recorded as not run, and `--only` adds it to the same file later.
python benchmarks/gpu.py --size=tiny [--torch none]
    the same program on small shapes, for a CPU: about a minute and a half, its figures mean nothing.

JAX_COMPILATION_CACHE_DIR and TORCHINDUCTOR_CACHE_DIR make a second call cheaper. Each section is a process of its own,
so that memory is its own and a failure stays there.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

from pairs import machine

SECTIONS = ("rates", "queue", "clipcap", "decode", "lavin", "lavin_torch")  # gpu_sections.SECTIONS
PACKAGES = ("jax", "flax", "optax", "torch", "transformers")
LIMITS = {"rates": 60, "queue": 150, "clipcap": 270, "decode": 100, "lavin": 200, "lavin_torch": 120}  # seconds
MARK = "ROW "  # a child's lines that are JSON


def main(arguments: list[str] | None = None) -> dict:
    """Runs the chosen sections; returns what was written."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=("full", "tiny"), default="full")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections; rates are always run")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/gpu.json")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything together")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--attention", choices=("softmax", "xla", "cudnn"), default="softmax", help="of ClipCap's towers"
    )
    parser.add_argument("--torch", choices=("both", "compiled", "eager", "none"), help="default: both; tiny: eager")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return child(json.loads(options.child))
    return Benchmark(options, ["benchmarks/gpu.py", *(sys.argv[1:] if arguments is None else arguments)]).run()


class Benchmark:
    """A run of the parent process: starts sections, keeps the record, writes it after every row."""

    def __init__(self, options: argparse.Namespace, command: list[str]):
        self.options, self.end = options, time.monotonic() + 60 * options.minutes
        tiny = options.size == "tiny"
        modes = {"both": ("compiled", "eager"), "none": ()}
        chosen = options.torch or ("eager" if tiny else "both")
        self.setting = {"size": options.size, "dtype": options.dtype, "modes": modes.get(chosen, (chosen,)), "peak": {}}
        self.setting["attention"] = options.attention
        self.record = self._earlier()
        self.record |= {"size": options.size, "dtype": options.dtype, "machine": machine(*PACKAGES)}
        self.record["commands"] = [*self.record.get("commands", []), f"python {' '.join(command)}"]

    def run(self) -> dict:
        """Returns the record when every section has run or failed."""
        chosen = [name for name in SECTIONS if name in self.options.only or name == "rates"]
        sections = self.record.setdefault("sections", {})
        self.record["rows"] = [row for row in self.record.get("rows", []) if row["section"] not in chosen]
        for name in chosen:
            sections[name] = {"status": "not run: the time was up", "date": str(datetime.date.today())}
        # On a small machine a process for each section would mostly import.
        groups = [chosen[:1], chosen[1:]] if self.options.size == "tiny" else [[name] for name in chosen]
        for group in groups:
            while group:  # what a failed process leaves is tried in another one
                group = self._process(group) if time.monotonic() < self.end - 5 else []
        self._write()
        print(table(self.record))
        return self.record

    def _process(self, group: list[str]) -> list[str]:
        """Runs sections in one process; returns those after the one in which it ended."""
        limit = self.end - time.monotonic()
        if self.options.size == "full":
            limit = min(limit, sum(LIMITS[name] for name in group))
        print(f"{', '.join(group)}: at most {limit:.0f} s", file=sys.stderr, flush=True)
        command = [sys.executable, __file__, "--child", json.dumps({"sections": group, **self.setting})]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", **os.environ}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        late = threading.Event()
        timer = threading.Timer(limit, lambda: (late.set(), process.kill()))
        timer.start()
        try:
            for line in process.stdout:
                if line.startswith(MARK):
                    self._take(json.loads(line.removeprefix(MARK)))
                else:
                    print(line, end="", file=sys.stderr)
        finally:
            timer.cancel()
            process.kill() if process.poll() is None and late.is_set() else process.wait()
        sections = self.record["sections"]
        for i, name in enumerate(group):
            if sections[name]["status"].startswith(("running", "not run")):
                why = f"stopped after {limit:.0f} s" if late.is_set() else f"its process ended with {process.wait()}"
                sections[name]["status"] = f"{why}; its rows up to then are kept"
                self._write()
                return group[i + 1 :]
        return []

    def _take(self, told: dict) -> None:
        """A child's line: the device, a section's state, or a row."""
        if "device" in told:
            self.record["device"] = told["device"]
            self.record["torch"] = told["torch"]
        elif "status" in told:
            self.record["sections"][told["section"]].update(told)
        else:
            self.record["rows"].append(told)
            if told["section"] == "rates":
                self.setting["peak"] |= told["ours"]
            print(_cells(told), file=sys.stderr, flush=True)
        self._write()

    def _write(self) -> None:
        out = self.options.out
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_suffix(".part")
        part.write_text(json.dumps(self.record, indent=1) + "\n")
        part.replace(out)
        out.with_suffix(".md").write_text(table(self.record))

    def _earlier(self) -> dict:
        """The file's record, if it is of the same size, dtype and packages on the same day's kind of machine."""
        if not self.options.out.exists():
            return {}
        found = json.loads(self.options.out.read_text())
        same = found.get("size") == self.options.size and found.get("dtype") == self.options.dtype
        return found if same and found.get("machine") == machine(*PACKAGES) else {}


def child(setting: dict) -> dict:
    """Runs the sections in this process and tells the parent by lines on stdout."""
    import gpu_rows
    import gpu_sections
    import jax

    def tell(what: dict) -> None:
        print(MARK + json.dumps(what), flush=True)

    sections = setting.pop("sections")
    setting = gpu_rows.Setting(**{**setting, "modes": tuple(setting["modes"])})
    without = gpu_rows.NO_TORCH if gpu_rows.torch is None else ""
    tell({"device": jax.devices()[0].device_kind, "torch": f"not there: {without}" if without else "there"})
    for name in sections:
        start, status = time.monotonic(), "done"
        tell({"section": name, "status": "running"})
        try:
            for row in gpu_sections.SECTIONS[name](setting):
                tell({"section": name, **row})
        except Exception as error:  # the others go on
            status = f"failed: {type(error).__name__}: {error}"[:600]
        tell({"section": name, "status": status, "seconds": time.monotonic() - start})
    return {}


HEAD = ("work", "ms", "expected ms", "samples/s", "share of", "compiled GiB", "device peak GiB")
HEAD += ("PyTorch compiled ms", "eager ms", "its peak GiB", "PyTorch / ours", "target", "met")


def table(record: dict) -> str:
    """The record as Markdown."""
    lines = [f"{record['machine']}", f"Device: {record.get('device', 'unknown')}; {record['dtype']}."]
    lines += [f"`{command}`" for command in record["commands"]]
    rates = {}
    for row in record["rows"]:
        if row["section"] == "rates":
            for side, found in (("JAX", row["ours"]), ("PyTorch", row.get("torch", {}).get("eager"))):
                if found:
                    rates[side] = found
    lines += [
        f"{side}: matmul {r['matmul_flops_per_s'] / 1e12:.4g} TFLOP/s, copy {r['copy_bytes_per_s'] / 1e9:.4g} GB/s."
        for side, r in rates.items()
    ]
    if record.get("torch", "there") != "there":
        lines.append(f"PyTorch's columns are empty: {record['torch']}.")
    if record["size"] != "full":
        lines.append("Small shapes: these figures show that the program runs, nothing else.")
    lines = [f"{line}  " for line in lines]
    lines += ["", f"| {' | '.join(HEAD)} |", f"|{'---|' * len(HEAD)}"]
    lines += [_cells(row) for row in record["rows"] if row["section"] != "rates"]
    notes = [f"{row['case']}: {row['note']}." for row in record["rows"] if row.get("note")]
    notes += [f"Section {n}: {s['status']}." for n, s in record["sections"].items() if s["status"] != "done"]
    return "\n".join([*lines, "", *notes]) + "\n"


def _cells(row: dict) -> str:
    """A row of the table."""
    ours, torch = row.get("ours", {}), row.get("torch", {})

    def milli(part):
        return f"{1e3 * part['seconds']:.4g}" if "seconds" in part else ""

    def gib(number):
        return f"{number / 2**30:.2f}" if number else ""

    target = row.get("target") or {}
    peak = next((side["device_peak_bytes"] for side in torch.values() if side.get("device_peak_bytes")), None)
    cells = [
        f"{row['section']}: {row['case']}",
        milli(ours),
        f"{1e3 * ours['expected_seconds']:.4g}" if "expected_seconds" in ours else "",
        f"{ours['samples_per_s']:.4g}" if "samples_per_s" in ours else "",
        f"{100 * ours['share']:.3g} % of {ours['share_of']}" if "share" in ours else "",
        gib(ours.get("compiled_bytes")),
        gib(ours.get("device_peak_bytes")),
        milli(torch.get("compiled", {})),
        milli(torch.get("eager", {})),
        gib(peak),
        f"{row['ratio']:.2f} ({row['ratio_to']})" if "ratio" in row else "",
        target.get("words", ""),
        {True: "yes", False: "NO"}.get(target.get("met"), ""),
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
