"""``ktk serve``: an OpenAI-compatible server."""

from __future__ import annotations

import ipaddress
import socket
from typing import Annotated

import typer

from ktk import env
from ktk.cli import opening
from ktk.kv.sizes import server_cache
from ktk.machine import cpu

RECORDER_MODES = ("stat", "stat_approx", "per_pass", "per_token")
SWAP_PART = 4  # of the KV cache, for the swap space
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1", "[::1]")
EPILOG = """Examples:

  ktk serve Qwen3-30B-A3B-int4

  ktk serve model.gguf --port 9000 --context 32768 --kv-cache 4

  KTK_API_KEY=secret ktk serve Qwen3-30B-A3B-int4 --host 0.0.0.0

  curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}]}'
"""


def command(
    call: typer.Context,
    model: opening.Model,
    host: Annotated[
        str, typer.Option(help="Address to bind; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            help="Clients must send it. KTK_API_KEY does the same, unseen by other users."
        ),
    ] = None,
    no_auth: Annotated[
        bool, typer.Option("--no-auth", help="Let everybody in who reaches the address.")
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(help="Web origin whose pages may call the server; may be given again."),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens of prompt and answer; default: the model's, at most 8192."
        ),
    ] = None,
    kv_cache: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            help="GiB of keys and values of all requests; default: 2, at most a quarter of what is "
            "free, but one whole context.",
        ),
    ] = None,
    kv_swap: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="GiB beside it for requests that must wait for its pages; what finds no room is "
            "computed again. Default: a quarter of --kv-cache.",
        ),
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, max=256, help="Requests generated at once; more wait.")
    ] = 16,
    batch_tokens: Annotated[
        int, typer.Option(min=16, help="Tokens of one forward pass: how prompts are cut up.")
    ] = 512,
    prompt_lookup: opening.PromptLookup = 8,
    recorder_mode: Annotated[
        str,
        typer.Option(
            "--expert-distribution-recorder-mode",
            help="What /start_expert_distribution_record records: stat, stat_approx, per_pass or "
            "per_token.",
        ),
    ] = "stat",
    method: opening.Method = "auto",
    weight_format: opening.WeightFormat = "auto",
    linear: opening.Linear = "file",
    dtype: opening.Dtype = None,
    adapter: opening.Adapter = None,
    force: opening.Force = False,
    expert_memory: opening.ExpertLimit = None,
    residency_policy: opening.Policy = None,
    gpu_experts: opening.GpuExperts = None,
    placement: opening.Placement = None,
    device: opening.Device = None,
    max_deferred_experts: opening.Deferred = 0,
    kv_dtype: opening.KvDtype = None,
    kv_disk: opening.KvDisk = None,
    kv_disk_limit: opening.KvDiskLimit = None,
) -> None:
    """Serve a model to OpenAI's clients, and a chat page, until Ctrl-C."""
    api_key = api_key or env.api_key()
    if no_auth and api_key:
        raise typer.BadParameter("--no-auth contradicts the API key: leave one of them out")
    if recorder_mode not in RECORDER_MODES:
        raise typer.BadParameter(
            f"--expert-distribution-recorder-mode {recorder_mode}: must be one of "
            f"{', '.join(RECORDER_MODES)}"
        )
    local = _is_loopback(host)
    if not local and not api_key and not no_auth:
        raise typer.BadParameter(
            f"--host {host} lets others in: give --api-key (or KTK_API_KEY), or say --no-auth"
        )
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:  # before a model is loaded for minutes
            probe.bind((host, port))
        except socket.gaierror as error:
            raise OSError(
                f"--host {host}: {error.strerror}; give this machine's name or address"
            ) from error
        except OSError as error:
            raise OSError(f"{host}:{port}: {error.strerror}; choose another --port") from error
        port = probe.getsockname()[1]
    try:
        import fastapi
        import llguidance
        import prometheus_client
        import uvicorn
    except ImportError as error:
        raise ImportError(f"ktk serve needs {error.name}: pip install 'ktk[serve]'") from error
    del fastapi, llguidance, prometheus_client, uvicorn
    opening.quiet_transformers()
    from ktk.generate.engine import Limits
    from ktk.generate.trial import start_engine
    from ktk.server.app import Access
    from ktk.server.serve import serve

    opened, store = opening.model_of(call)
    found = opened.description
    size, swap = cache_bytes(kv_cache, kv_swap, found.kv_bytes, force)
    limits = Limits(
        found.context, max_requests, 256, batch_tokens, size, prompt_lookup, swap, kv_dtype
    )
    engine = start_engine(opened, limits)
    if engine.why_alone is not None:
        typer.echo(f"ktk: warning: one request at a time: {engine.why_alone}", err=True)
    if store is not None and not engine.keep(store, opened, linear):
        reason = engine.why_not_native
        typer.echo(f"ktk: warning: --kv-disk is not used: {reason}", err=True)
    if engine.kept is not None:
        typer.echo(f"{kv_disk}: {engine.kept.line()}", err=True)
    hosts = (*LOCAL_HOSTS, host) if local and not api_key else None
    shown = f"[{host}]" if ":" in host else host
    typer.echo(
        f"{opened.name}, {found.kernel}: chat page http://{shown}:{port}/, "
        f"API http://{shown}:{port}/v1",
        err=True,
    )
    serve(
        opened,
        engine,
        host,
        port,
        Access(api_key, hosts=hosts, cors_origins=tuple(cors_origin or ())),
        recorder_mode=recorder_mode,
    )


def _is_loopback(host: str) -> bool:
    """Whether an address to bind to is reached from this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def cache_bytes(
    cache_gib: float | None, swap_gib: float | None, one_context: int, force: bool
) -> tuple[int, int]:
    """Bytes for the KV cache and for its swap space, once the model is loaded; by default enough
    for one sequence of one_context bytes, if they are free, and a quarter more.

    Raises MemoryError if more is wanted than is free.
    """
    from ktk.generate.describe import size

    _, free = cpu.memory()
    cache = server_cache(one_context, free) if cache_gib is None else int(cache_gib * 2**30)
    swap = cache // SWAP_PART if swap_gib is None else int(swap_gib * 2**30)
    asked = (0 if cache_gib is None else cache) + (0 if swap_gib is None else swap)
    if free and asked > free and not force:
        said = " ".join(
            f"{name} {gib:g}"
            for name, gib in (("--kv-cache", cache_gib), ("--kv-swap", swap_gib))
            if gib is not None
        )
        raise MemoryError(f"{said} is {size(asked)}, and {size(free)} are free")
    return cache, swap
