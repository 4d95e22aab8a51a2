"""Settings of the front end's process. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_sps2.server.protocol import Endpoints


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontEndConfig:
    """What `sps2 serve` tells the HTTP front end."""

    host: str
    port: int  # 0: any free one
    endpoints: Endpoints
    checkpoint: str
    served_model_name: str
    api_keys: tuple[str, ...] = ()
    num_replicas: int = 1
    world_size: int = 1
    max_queue: int = 256
    max_body_bytes: int = 32 << 20
    max_prompts_per_request: int = 128
    max_n: int = 64
    heartbeat_timeout_s: float = 10.0
    drain_timeout_s: float = 30.0
    request_timeout_s: float | None = None
    default_max_tokens: int = 16
    log_level: str = "warning"
    port_file: str | None = None
    # Its engine may end and come again: requests are answered with 503 meanwhile. False: it ends with it.
    outlives_engine: bool = False
    # Who starts the engine, or starts it again; once that process is gone, nobody will. None: not known.
    keeper_pid: int | None = None
    leftovers: tuple[str, ...] = ()  # files and folders to remove at the end
