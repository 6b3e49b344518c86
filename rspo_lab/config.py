"""The configuration of one training run: every choice a field, checked as soon as it is made."""

from dataclasses import dataclass
from pathlib import Path

import torch

from rspo_lab.advantages import ADVANTAGES
from rspo_lab.masks.designs import design as design_named
from rspo_lab.models.kv_cache import KINDS
from rspo_lab.models.loading import find
from rspo_lab.objectives import RECIPES
from rspo_lab.tasks import task as task_named
from rspo_lab.tasks.verdict import in_words

CHOICES = {
    "objective": RECIPES,
    "advantage": ADVANTAGES,
    "scope": ("batch", "group", "none"),
    "residual": ("shared", "leave_one_out"),
    "score_unit": ("sequence", "token"),
    "zero_variance": ("keep", "skip"),
    "lora": ("none", "all-linear", "d1"),
    "cache": KINDS,
    "style": ("compact", "d1"),
    "dtype": ("float32", "bfloat16"),
}
AT_LEAST_ONE = (
    "steps",
    "prompts",
    "views",
    "inner_steps",
    "eval_every",
    "eval_problems",
    "checkpoint_every",
    "snapshots",
    "slice_size",
)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run; `objective="rspo"` with lam = 0 is the raw advantage."""

    model: str  # local folder or hub name of the base, which is also the frozen reference
    task: str
    data: str = ""  # a local file in the task's public format; "" is the task's own training split
    eval_data: str = ""  # the same, of held-out problems; "" is the task's test split
    style: str = "compact"  # prompt style: compact (tiny models) or d1
    seed: int = 0
    steps: int = 120
    prompts: int = 16  # a step
    group: int = 8  # completions a prompt
    length: int = 0  # completion tokens where the style is not compact (there the task says)
    block: int = 0  # tokens a decoding block; 0 is the whole completion
    decode_steps: int = 0  # denoising steps a completion; 0 is one a token
    temperature: float = 1.0
    threshold: float = (
        1.0  # below 1, rollouts also unmask every token more confident than this at once (faster)
    )
    # keys and values held while a block of a rollout is decoded: prefix or dual (faster,
    # approximate)
    cache: str = "none"
    objective: str = "rspo"
    lam: float = 0.03  # nats^-1 in the score's unit
    advantage: str = "standardized"
    scope: str = "batch"  # rows that share a centre of d: batch, group, none
    residual: str = "shared"  # or leave_one_out
    score_unit: str = "sequence"  # sum of nats; or token: mean over valid tokens
    use_reference: bool = True  # False: d is the score itself
    zero_variance: str = (
        "keep"  # groups whose rewards agree: keep (pulled to the reference) or skip
    )
    # a name of masks.DESIGNS, with parameters if it has any: bsc(0.5, 0.5); auto:
    # views.recommend_design
    design: str = "count"
    views: int = 2  # a distinct completion
    common_masks: bool = (
        False  # completions of a prompt whose tokens stand in the same places share their masks
    )
    inner_steps: int = 1  # updates on one rollout
    # above 0: d = (policy - rollout's policy) on `views` masks + (that - reference) on this many,
    # once a rollout
    old_views: int = 0
    # share the views out by the size of a completion's update, as measured on the old_views
    allocate: bool = False
    lr: float = 3e-4
    warmup: int = 10  # steps of linear warm-up, then a cosine to a tenth
    max_grad_norm: float = 1.0
    lora: str = "none"  # none (all weights), all-linear, or d1
    lora_rank: int = 16
    lora_alpha: float = 32.0
    eval_every: int = 20
    eval_steps: int = 0  # denoising steps of the greedy held-out evaluation; 0 is one a token
    eval_problems: int = 192  # Countdown has 196
    checkpoint_every: int = 10
    snapshots: int = 4  # evenly spaced saved policies, the last one final
    # masked sequences a forward of a process; more views than this cost one more forward each, not
    # more memory
    slice_size: int = 512
    device: str = "auto"  # cuda, else cpu
    dtype: str = "float32"
    attention: str = (
        "sdpa"  # an implementation that transformers knows: sdpa, eager, flash_attention_2 ...
    )

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )
        for name in AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.group < 2:
            raise ValueError(f"group must be at least 2 to have an advantage, not {self.group}")
        if self.style != "compact" and self.length < 1:
            raise ValueError(
                f"style {self.style!r} needs a length, the number of completion tokens"
            )
        if self.dtype != "float32" and self.lora == "none":
            raise ValueError(
                f"{self.dtype} weights would round small updates away: train LoRA adapters (lora) or use float32"
            )
        if self.old_views < 0:
            raise ValueError(f"old_views must be at least 0, not {self.old_views}")
        if self.lam < 0 or self.lr <= 0:
            raise ValueError(f"lam must be >= 0 and lr > 0, not {self.lam} and {self.lr}")
        if self.old_views and (self.objective != "rspo" or not self.use_reference):
            raise ValueError(
                "old_views splits d = policy - reference in two levels: it needs objective='rspo' and use_reference"
            )
        if self.allocate and (not self.old_views or self.common_masks or self.residual != "shared"):
            raise ValueError(
                "allocate weighs completions on old_views, so set these; it goes with own masks and residual='shared'"
            )
        design = "bsc" if self.design == "auto" else self.design
        numbers = [
            self.old_views or self.views,
            *(range(1, self.views + 2) if self.allocate else ()),
            self.views,
        ]
        for views in numbers:  # a design refuses those that it cannot make
            masks = design_named(design)(
                torch.ones(1, 4, dtype=torch.bool), views, generator=torch.Generator()
            )
        if self.residual == "leave_one_out" and masks.replicates < 2:
            raise ValueError(
                f"leave_one_out needs 2 replicates, {self.design} makes 1 of {self.views} views: raise views or take count"
            )
        if not hasattr(task_named(self.task), "COMPACT_LENGTH"):
            in_words(self.style, self.task)
        find(self.model)
        for name in ("data", "eval_data"):
            if (file := getattr(self, name)) and not Path(file).is_file():
                raise FileNotFoundError(
                    f"no file of problems at {name} = {file}: give a path from here ({Path.cwd()}) or a full one"
                )

    def scope_of(self, d: torch.Tensor) -> torch.Tensor | str:
        """`scope` as the objective takes it, for draws (R, B) of group-major rows."""
        return (
            torch.arange(d.shape[1], device=d.device) // self.group
            if self.scope == "group"
            else self.scope
        )

    @property
    def snapshot_steps(self) -> list[int]:
        return sorted({round(self.steps * (i + 1) / self.snapshots) for i in range(self.snapshots)})
