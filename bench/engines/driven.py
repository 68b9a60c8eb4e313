"""An engine in a process of its own, in the Python it is installed in: it answers JSON lines.

It first says what it is:

    {"version", "kernel", "bytes_per_weight", "arithmetic"}     as Rival has them

and then answers

    {"check": TOKENS}                        {"error", "tolerance", "worst", "worst_tolerance"}
    {"measure": TOKENS, "seconds": SECONDS}  {"seconds": [...], "touched": [...]}

or, to any of them, {"why_not": REASON}. Between its turns it sleeps.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from engines.rival import SECONDS, Rival
from ktk.bench.shapes import Shape

HERE = Path(__file__).parent


class DrivenRival(Rival):
    """engine : what drive_ENGINE.py drives. python : the interpreter it is installed in.

    Raises RuntimeError with the engine's reason, or how it ended, if it cannot run; OSError if
    ``python`` cannot be started.
    """

    def __init__(
        self,
        engine: str,
        python: str,
        shape: Shape,
        method: str,
        *,
        threads: int,
        max_tokens: int,
        script: Path | None = None,
    ) -> None:
        sizes = {
            "method": method,
            "hidden": shape.hidden_size,
            "intermediate": shape.intermediate_size,
            "experts": shape.num_experts,
            "top-k": shape.top_k,
            "threads": threads,
            "max-tokens": max_tokens,
        }
        script = script or HERE / f"drive_{engine.replace('-', '_')}.py"
        arguments = [f"--{name}={value}" for name, value in sizes.items()]
        self.name = f"{engine} {method} {threads}t"
        self.said = tempfile.TemporaryFile()  # noqa: SIM115  closed with the process
        self.process: subprocess.Popen[str] | None = None
        try:
            self.process = subprocess.Popen(
                [python, str(script), *arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.said,
                text=True,
            )
            is_ = self._answer()
        except BaseException:
            self.close()
            raise
        kernel = f"{engine} {is_['version']} {is_['kernel']}"
        super().__init__(shape, self.name, kernel, is_["bytes_per_weight"], is_["arithmetic"])

    def _ask(self, **message: Any) -> dict[str, Any]:
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it ended; _answer says how
            self.process.stdin.write(json.dumps(message) + "\n")
            self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name} {self._how_it_ended(self.process)}")
        answer: dict[str, Any] = json.loads(line)
        if "why_not" in answer:
            raise RuntimeError(f"{self.name}: {answer['why_not']}")
        return answer

    def _how_it_ended(self, process: subprocess.Popen[str]) -> str:
        code = process.wait()
        self.said.seek(0)
        last = self.said.read().decode(errors="replace").strip().rpartition("\n")[2]
        command = " ".join(map(str, process.args))  # type: ignore[arg-type]
        how = signal.strsignal(-code) if code < 0 else str(code)
        return f"ended with {how}: {last or 'it said nothing'} ({command})"

    def verify(self, num_tokens: int) -> None:
        """The driver compares tokens of a batch of this many with float32; RuntimeError if they
        are further off than its format explains.
        """
        found = self._ask(check=num_tokens)
        for what, limit in (("error", "tolerance"), ("worst", "worst_tolerance")):
            if not found[what] <= found[limit]:  # NaN is wrong too
                which = "mean" if what == "error" else "largest"
                raise RuntimeError(
                    f"{self.name}: its {which} error at {num_tokens} tokens is "
                    f"{found[what]:.3g} of the mean output, more than {found[limit]:.3g}: "
                    "it is not measured"
                )

    def times(self, num_tokens: int) -> tuple[list[float], list[float]]:
        answer = self._ask(measure=num_tokens, seconds=SECONDS)
        return answer["seconds"], answer["touched"]

    def close(self) -> None:
        if self.process:
            self.process.kill()
            self.process.communicate()
        self.said.close()
