"""Several bodies of the same settings, each with heads of its own: actor and critic apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax

from rlx.interfaces import Head, Network
from rlx.types import Array, Carry, NetInput, Params


@dataclass(frozen=True, kw_only=True, eq=False)
class Separate:
    """An interfaces.Network whose features are a dict of those of each body."""

    network: Network
    bodies: Mapping[str, tuple[str, ...]]  # the names of each body's heads

    @property
    def is_recurrent(self) -> bool:
        return self.network.is_recurrent

    def init(self, key: Array, heads: Mapping[str, Head], **further: tuple[Array, ...]) -> Params:
        """The parameters by body; `key` is consumed."""
        keys = jax.random.split(key, len(self.bodies))
        return {
            body: self.network.init(
                own,
                {name: heads[name] for name in names},
                **{name: further[name] for name in names if name in further},
            )
            for own, (body, names) in zip(keys, self.bodies.items(), strict=True)
        }

    def apply(self, params: Params, inputs: NetInput, carry: Carry) -> tuple[Any, Carry]:
        """Does `stack_frames`, then `unroll`."""
        stacked, frames = self.stack_frames(inputs, carry)
        features, core = self.unroll(params, stacked, carry.core)
        return features, Carry(core=core, frames=frames)

    def stack_frames(self, inputs: NetInput, carry: Carry) -> tuple[NetInput, Any]:
        """The bodies share the stack."""
        return self.network.stack_frames(inputs, carry)

    def unroll(self, params: Params, stacked: NetInput, core: Any) -> tuple[Any, Any]:
        """Unrolls the bodies that `params` has; the other recurrent states stay as they are."""
        found = {body: self.network.unroll(params[body], stacked, core[body]) for body in params}
        features = {body: one for body, (one, _) in found.items()}
        return features, {**core, **{body: after for body, (_, after) in found.items()}}

    def read(self, params: Params, name: str, head: Head, features: Any, *further: Array) -> Any:
        """The output of a head for its own body's features."""
        body = next(body for body, names in self.bodies.items() if name in names)
        return self.network.read(params[body], name, head, features[body], *further)

    def initial_carry(self, batch: int) -> Carry:
        one = self.network.initial_carry(batch)
        return Carry(core=dict.fromkeys(self.bodies, one.core), frames=one.frames)
