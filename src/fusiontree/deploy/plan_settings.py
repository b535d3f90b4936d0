"""What to plan for, and by what."""

from __future__ import annotations

from dataclasses import dataclass, field

from fusiontree.deploy.costs import DEFAULT_CONTEXT
from fusiontree.deploy.criteria import CRITERIA, MEASURED
from fusiontree.errors import InputError, nearest

#: Nats that freezing gates may cost where nothing else is asked for.
FREEZE_GATES = 0.002


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """How to plan.

    Attributes:
        criterion: of `CRITERIA`.
        targets: as `parse_targets` gives them; at least one.
        empty_layers: whether a layer may lose both branches.
        heads: whether single heads may go too, for criteria that measure removals (`MEASURED`); None: with these.
        freeze_gates: first freeze gates to their means while the loss rises by no more than this, in nats; 0: none.
        context: tokens at which time and state are counted.
        rounds: of timing.
        seed: of the random criterion, and of the rows that train the scalars.
        is_verified: whether the cut model itself, measured, has to reach the targets; else the costs that its branches
            add up to decide, the same for every plan with the same costs.
    """

    criterion: str = "ablation"
    targets: dict[str, float] = field(default_factory=dict)
    empty_layers: bool = False
    heads: bool | None = None
    freeze_gates: float = FREEZE_GATES
    context: int = DEFAULT_CONTEXT
    rounds: int = 3
    seed: int = 0
    is_verified: bool = True

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            close = nearest(self.criterion, CRITERIA)
            hint = f"did you mean {close}?" if close else f"there are {', '.join(CRITERIA)}"
            raise InputError(f"there is no criterion {self.criterion!r}; {hint}")
        if self.heads and self.criterion not in MEASURED:
            raise InputError(
                f"the criterion {self.criterion} ranks whole branches: to cut single heads, whose removal has to be "
                f"measured, take {' or '.join(MEASURED)}"
            )
        if not self.targets:
            raise InputError("name a target, such as decode=1.4x, memory=0.75x or max_loss_increase=0.05")

    @property
    def takes_heads(self) -> bool:
        """Whether single heads may go."""
        return self.criterion in MEASURED if self.heads is None else self.heads
