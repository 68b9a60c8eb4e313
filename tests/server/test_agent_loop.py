"""An agent library's own tool loop against `ktk serve`: its requests, its checks of arguments by
their types, its results of tools, its end. `make test-agent` runs this; otherwise it skips.

The model is random and says nothing sensible. The library requires a call each time, of the tool or
of the answer, so that chance decides how long the loop is.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from make.serving import make_model, serving

AGENT = '''
import sys
from typing import Annotated, Literal

from pydantic import BaseModel, Field
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from pydantic_ai.settings import ModelSettings


class Place(BaseModel):
    name: str = Field(max_length=8)
    north: int = Field(ge=-90, le=90)


class Report(BaseModel):
    sky: Literal["clear", "clouds", "rain"]
    degrees: int = Field(ge=-40, le=50)


calls = 0
provider = OpenAIProvider(base_url=sys.argv[1] + "/v1", api_key="none")
agent = Agent(OpenAIChatModel(sys.argv[2], provider=provider), output_type=Report, retries=0)


@agent.tool_plain
def weather(place: Place, days: Annotated[int, Field(ge=1, le=7)]) -> str:
    """The weather at a place."""
    global calls
    calls += 1
    return f"in {days} days at {place.name}: clear"


for seed in range(6):
    settings = ModelSettings(seed=seed, max_tokens=400, parallel_tool_calls=False)
    done = agent.run_sync("What is the weather like?", model_settings=settings)
    print(f"{len(done.all_messages())} messages, {done.output!r}")
print(calls, "calls of the tool")
'''


def test_a_loop_of_calls_comes_to_its_answer(tmp_path: Path) -> None:
    python = os.environ.get("AGENT_PYTHON")
    if python is None:
        pytest.skip("needs an agent library: make test-agent")
    model = make_model(tmp_path / "tiny-moe", is_native=True)
    with serving(model, "--context", "8192") as server:
        command = [python, "-W", "ignore", "-c", AGENT, server.url, "tiny-moe"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    *runs, calls = done.stdout.splitlines()
    assert len(runs) == 6 and all("Report(sky=" in run for run in runs)
    assert int(calls.split()[0]) > 0
