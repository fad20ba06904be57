"""The server as an application of Ray Serve: `serve run prerope.server.ray_app:app min_replicas=2`.

    client → Serve's proxy → Entrance: reads the body → Ray's router: who has this beginning → Replica: the engine

The settings are those of the environment in which the application is deployed, and go to every replica. How many there
are, and what of the machine each may have, is `Scale`, given as arguments of `serve run` or as `args` of a config file.
Ray's own router chooses replicas; it is named by its private module, since the public one asks for vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from prerope.server.flags import load_settings
from prerope.server.machine.allowance import cores
from prerope.server.ray_app.entrance import Entrance
from prerope.server.ray_app.replica import Replica
from prerope.server.ray_app.scaling import QueuedTokens
from prerope.server.settings import Settings
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, RequestRouterConfig

if TYPE_CHECKING:
    from ray.serve import Application

ROUTER = "ray.llm._internal.serve.routing_policies.prefix_aware.prefix_aware_router.PrefixCacheAffinityRouter"
ROUTING = {
    "match_rate_threshold": 0.5,  # a turn has most of what it has from the turn before it; less is no conversation
    "imbalanced_threshold": 8,  # requests that one replica may have more than another for the sake of its cache
    "do_eviction": True,
    "eviction_threshold_chars": 8_000_000,
    "eviction_target_chars": 6_000_000,
}

MAX_OPEN = 100_000
"""Requests that Ray lets through: the engine has limits of its own, and says 429."""

HEALTH_PERIOD_S = 2.0
LOOK_BACK_S = 20.0
"""Replicas report every ten seconds."""

CLOSE_GRACE_S = 10.0
"""Seconds past SHUTDOWN_TIMEOUT_S until Ray kills a replica that is to go."""


class Scale(BaseModel):
    """How many replicas, and what each may have."""

    model_config = ConfigDict(extra="forbid")

    min_replicas: int = Field(default=1, ge=1)
    max_replicas: int | None = Field(default=None, ge=1, description="None: min_replicas, which do not change then")
    queued_tokens: int = Field(
        default=16_384, ge=1, description="Prompt tokens that a replica may have before it: for more there is another"
    )
    upscale_delay_s: float = Field(default=10, ge=0)
    downscale_delay_s: float = Field(default=300, ge=0)
    num_cpus: float | None = Field(default=None, gt=0, description="Of a replica. None: an equal share of the machine")
    num_gpus: float | None = Field(
        default=None, ge=0, description="Of a replica. None: TENSOR_PARALLEL_SIZE where DEVICE is cuda, else 0"
    )


def app(arguments: dict[str, Any]) -> Application:
    """What `serve run` deploys; the arguments are those of `Scale`. ConfigurationError for a wrong setting."""
    scale, settings = Scale.model_validate(arguments), load_settings([])
    entrance = serve.deployment(
        name="Entrance",
        max_ongoing_requests=MAX_OPEN,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=settings.shutdown_timeout_s + CLOSE_GRACE_S,
    )(serve.ingress()(Entrance))
    replicas = serve.deployment(name="Replica", **_replica_options(settings, scale))(Replica)
    application: Application = entrance.bind(replicas.bind(settings), settings)
    return application


def _replica_options(settings: Settings, scale: Scale) -> dict[str, Any]:
    most = max(scale.min_replicas, scale.max_replicas or 0)
    share = cores().amount / most
    cpus = scale.num_cpus or (int(share) if share >= 1 else share)  # Ray takes parts of a core below one alone
    gpus = scale.num_gpus
    if gpus is None:
        gpus = settings.tensor_parallel_size if settings.device.startswith("cuda") else 0
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=most,
            upscale_delay_s=scale.upscale_delay_s,
            downscale_delay_s=scale.downscale_delay_s,
            look_back_period_s=LOOK_BACK_S,
            policy=AutoscalingPolicy(policy_function=QueuedTokens, policy_kwargs={"most": scale.queued_tokens}),
        ),
        "request_router_config": RequestRouterConfig(request_router_class=ROUTER, request_router_kwargs=ROUTING),
        "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus},
        "max_ongoing_requests": MAX_OPEN,
        "health_check_period_s": HEALTH_PERIOD_S,
        "graceful_shutdown_wait_loop_s": 0.5,
        "graceful_shutdown_timeout_s": settings.shutdown_timeout_s + CLOSE_GRACE_S,
    }
