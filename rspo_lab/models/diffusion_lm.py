"""The diffusion model: a Hugging Face transformer made bidirectional, scored and sampled through
one small wrapper.

Shapes: B sequences, P prompt tokens (left-padded), L completion tokens, V vocabulary.
Log-probabilities in nats.
"""

import copy
import json
import sys
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from rspo_lab.batch import Batch
from rspo_lab.distributed import ALONE, whole
from rspo_lab.models.architectures import LladaConfig, read_config
from rspo_lab.models.kv_cache import Held
from rspo_lab.models.tokenizer import char_tokenizer, read_tokenizer
from rspo_lab.models.vocabulary_head import head_logits, token_logp

if not sys.stderr.isatty():  # bars only where somebody watches them move
    hf_logging.disable_progress_bar()

DATA = Path(__file__).parents[2] / "data"
LORA_TARGETS = {
    "all-linear": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "d1": [
        "q_proj",
        "k_proj",
        "v_proj",
        "up_proj",
    ],  # the four of d1's seven names that exist in LLaDA's blocks
}


class DiffusionLM(nn.Module):
    """A bidirectional transformer with its tokenizer, as a denoiser and as the sampler's logits.

    `forward(batch, hidden)` is the denoiser that estimators and oracle call; it puts the head on
    the hidden rows only. Ids that stand for no text (the mask, ids beyond the tokenizer) have
    probability 0 in scores and samples alike. Where a model's state at position i - 1 gives the
    logits of i (Dream), both shift; position 0 then keeps its own state.
    """

    def __init__(self, hf: nn.Module, tokenizer: PreTrainedTokenizerFast):
        super().__init__()
        if tokenizer.mask_token_id is None or tokenizer.pad_token_id is None:
            raise ValueError(
                "the tokenizer needs a mask token and a pad token: set tokenizer.mask_token and .pad_token"
            )
        self.hf, self.tokenizer, self.mask_id = hf, tokenizer, tokenizer.mask_token_id
        self.world = (
            ALONE  # in a world of several processes each call of `forward` shares out its rows
        )
        banned = torch.ones(hf.config.vocab_size, dtype=torch.bool)
        banned[list(tokenizer.get_vocab().values())] = False
        banned[self.mask_id] = True
        self.register_buffer("banned", banned, persistent=False)

    @property
    def device(self) -> torch.device:
        return self.banned.device

    @property
    def adapted(self) -> bool:
        """True if trained through LoRA adapters."""
        return hasattr(self.hf, "peft_config")

    def forward(self, batch: Batch, hidden: Bool[Tensor, "B L"]) -> Float[Tensor, "B L"]:
        """log q(y_i | x, y without the hidden tokens) at the hidden positions, 0 elsewhere."""
        mine, rows = self.world.share(len(batch)), len(batch)
        batch, hidden = batch.rows(mine), hidden[mine]
        ids = torch.cat([batch.prompt, batch.completion.masked_fill(hidden, self.mask_id)], 1)
        states = self._states(ids, batch.prompt_valid)[:, batch.prompt.shape[1] :]
        logp = token_logp(
            states[hidden], self._base.lm_head.weight, batch.completion[hidden], self.banned
        )
        return self.world.gather(logp.new_zeros(hidden.shape).masked_scatter(hidden, logp), rows)

    @torch.no_grad()
    def logits(
        self, ids: Int[Tensor, "B S"], prompt_valid: Bool[Tensor, "B P"], start: int, stop: int
    ) -> Float[Tensor, "B n V"]:
        """Logits of positions start..stop given all of `ids`, each process its own; -inf where an
        id stands for no text.
        """
        return head_logits(
            self._states(ids, prompt_valid)[:, start:stop], self._base.lm_head.weight, self.banned
        )

    @torch.no_grad()
    def hold(
        self,
        ids: Int[Tensor, "B S"],
        prompt_valid: Bool[Tensor, "B P"],
        start: int,
        stop: int,
        *,
        suffix: bool,
    ):
        """(`logits`, a function that gives them again for ids that differ in start..stop only), in
        less time and approximately.

        Keys and values of what stands before `start`, and with `suffix` of what stands from `stop`
        on, stay those of these ids. Exact until the ids change, and where there is one layer.
        """
        held, first = Held(), max(start - getattr(self._base, "shifted", False), 0)
        states = self._states(ids, prompt_valid, held)
        held.close(first, end := stop if suffix else ids.shape[1])
        where = torch.arange(first, end, device=ids.device)[None]

        def again(ids):
            return self.held_logits(ids[:, first:end], prompt_valid[:, :first], held, where)[
                :, start - first : stop - first
            ]

        return head_logits(states[:, start:stop], self._base.lm_head.weight, self.banned), again

    @torch.no_grad()
    def held_logits(
        self,
        ids: Int[Tensor, "B n"],
        held_valid: Bool[Tensor, "B P"],
        held: Held,
        where: Int[Tensor, "1 n"],
    ):
        """Logits of the ids at positions `where`, beside what is held."""
        return head_logits(
            self._states(ids, held_valid, held, position_ids=where),
            self._base.lm_head.weight,
            self.banned,
        )

    def _states(self, ids, prompt_valid, held=None, **more):
        mask = None
        if not prompt_valid.all():
            keys = ids.shape[1] + (held.get_seq_length() if held else 0)
            mask = torch.cat(
                [prompt_valid, prompt_valid.new_ones(len(ids), keys - prompt_valid.shape[1])], 1
            )
            if (
                self._base.config._attn_implementation == "sdpa"
            ):  # takes a mask that broadcasts over queries as it is
                mask = mask[:, None, None, :]
        with self.precision():
            found = self._base.model(
                input_ids=ids,
                attention_mask=mask,
                past_key_values=held,
                use_cache=held is not None,
                **more,
            )
        states = found.last_hidden_state
        return (
            torch.cat([states[:, :1], states[:, :-1]], 1)
            if getattr(self._base, "shifted", False)
            else states
        )

    def precision(self) -> torch.autocast:
        """The context of a forward of `hf`: adapters, kept in float32 for the optimizer, multiply
        in a base's half precision.
        """
        dtype = self._base.lm_head.weight.dtype
        return torch.autocast(
            self.device.type, dtype=dtype, enabled=self.adapted and dtype.itemsize == 2
        )

    @property
    def _base(self):
        return self.hf.get_base_model() if self.adapted else self.hf

    def encode(self, texts: list[str]) -> tuple[Int[Tensor, "B P"], Bool[Tensor, "B P"]]:
        """(ids, is text), left-padded to the longest; a mask token inside a text is an error."""
        rows = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        for row, text in zip(rows, texts):
            if self.mask_id in row or self.tokenizer.unk_token_id in row:
                why = "it holds the mask token or an unknown character (is the model one for this task?)"
                raise ValueError(f"the tokenizer cannot write {text[:60]!r}: {why}")
        width = max(len(row) for row in rows)
        ids = torch.tensor(
            [[self.tokenizer.pad_token_id] * (width - len(row)) + row for row in rows]
        )
        text = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
        return ids.to(self.device), text.to(self.device)

    def encode_canvas(self, canvases: list[str]) -> Int[Tensor, "B L"]:
        """Completions to start decoding from, one token a character, the mask id for each "?"; all
        of one length.
        """
        rows = [
            [self.mask_id if c == "?" else self.tokenizer.convert_tokens_to_ids(c) for c in canvas]
            for canvas in canvases
        ]
        return torch.tensor(rows, device=self.device)

    def decode(self, completion: Int[Tensor, "B L"]) -> list[str]:
        """The text of each row up to its first end-of-text token."""
        end, texts = self.tokenizer.eos_token_id, []
        for row in completion.tolist():
            row = row[: row.index(end)] if end in row else row
            texts.append(
                self.tokenizer.decode(
                    row, skip_special_tokens=False, clean_up_tokenization_spaces=False
                )
            )
        return texts

    def save(self, folder: Path, *, original_names: bool = False) -> None:
        """Model (or adapter) and tokenizer as an ordinary Hugging Face checkpoint in safetensors.

        `original_names` writes a LLaDA's tensors under LLaDA's names instead of Llama's, which its
        own code reads once its own config.json takes the place of ours; `load` reads both.  The
        other models' names are their original ones.
        """
        wanted = {
            name: t
            for name, t in self.hf.state_dict().items()
            if "lora_" in name or not self.adapted
        }
        state = whole(
            wanted, keep=self.world.rank == 0
        )  # under FSDP2 all processes bring their parts together, and the first one writes
        if self.world.rank:
            return
        if self.adapted:  # adapters never hold embeddings; "auto" would ask the hub
            self.hf.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        else:
            self.hf.save_pretrained(folder, state_dict=state, save_original_format=original_names)
        self.tokenizer.save_pretrained(folder)


def load(
    name: str | Path,
    *,
    device: str = "auto",
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
) -> DiffusionLM:
    """A checkpoint from a local folder, one of the project's own (`base-sudoku`), or a hub name;
    strict about what it finds.

    LLaDA, Dream and A2D-Qwen3 are read in their published layout or in transformers', without any
    code of theirs.  A folder of LoRA adapters, as training saves them, is loaded on top of the base
    that it names.  device: "auto" is cuda where there is one, else the CPU.  attention: a name that
    transformers knows, "sdpa", "eager", "flash_attention_2" ...

    Raises FileNotFoundError for a folder or a tokenizer that is not there, ValueError for tensors
    that are missing, unexpected, of another shape or pickled, for a causal model, and for an
    architecture that has no native class.
    """
    name, device = find(name), _device(device)
    if (Path(name) / "adapter_config.json").is_file():
        from peft import PeftModel

        base_name = json.loads((Path(name) / "adapter_config.json").read_text())[
            "base_model_name_or_path"
        ]
        base = load(base_name, device=device, dtype=dtype, attention=attention)
        base.hf = PeftModel.from_pretrained(
            base.hf, name, is_trainable=True
        ).eval()  # without the dropout that its training may have had
        return _adapted(base)
    config = read_config(name)
    tokenizer = read_tokenizer(name, config)
    if Path(name).is_dir() and not list(Path(name).glob("*.safetensors")):
        raise ValueError(
            f"no safetensors in {name}: pickled weights (.bin) can run code and are not read; save them as safetensors"
        )
    hf, found = AutoModelForCausalLM.from_pretrained(
        name,
        config=config,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        output_loading_info=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # which are reported and refused with the others below
    )
    wrong = {
        kind: sorted(map(str, found[kind]))[:3]
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if found[kind]
    }
    if wrong:
        raise ValueError(f"{name} is not a checkpoint of {type(hf).__name__}: {wrong}")
    model = DiffusionLM(hf.eval(), tokenizer).to(device)
    _assert_bidirectional(hf, str(name))
    return model


def find(name: str | Path) -> str | Path:
    """The folder of a checkpoint if there is one, else what can only be a hub name, "owner/model";
    or FileNotFoundError.
    """
    for folder in (Path(name), DATA / name):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
    if Path(name).is_absolute() or str(name).count("/") != 1 or str(name).startswith("."):
        raise FileNotFoundError(
            f"no model at {name}: give a folder with config.json, one of data/base-*, or a hub name owner/model"
        )
    return name


def tiny(chars: str, *, seed: int, layers: int = 3, width: int = 96) -> DiffusionLM:
    """A freshly initialised small model over a character vocabulary; about 335k parameters by
    default.
    """
    return untrained(
        char_tokenizer(chars),
        seed=seed,
        layers=layers,
        width=width,
        heads=4,
        ffn=8 * width // 3,
        positions=256,
    )


def untrained(
    tokenizer: PreTrainedTokenizerFast,
    *,
    seed: int,
    layers: int,
    width: int,
    heads: int,
    ffn: int,
    positions: int,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> DiffusionLM:
    """A freshly initialised model of LLaDA's architecture, made on its device and in its dtype:
    there is no copy in another.

    ffn: width of the gated layer; positions: the longest sequence.
    """
    device = torch.device(_device(device))
    config = LladaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        tie_word_embeddings=False,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    on_gpu = device.type == "cuda"
    with (
        torch.random.fork_rng(devices=[device] if on_gpu else []),
        device,
    ):  # transformers initialises from the global generator
        (torch.cuda if on_gpu else torch.default_generator).manual_seed(seed)
        hf = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    _assert_bidirectional(hf, "the untrained model")
    return DiffusionLM(hf.eval(), tokenizer).to(device)


def add_lora(model: DiffusionLM, preset: str, *, rank: int, alpha: float, seed: int) -> None:
    """Put trainable low-rank adapters (no dropout) on the matrices of a preset and freeze the rest.

    Raises ValueError for an unknown preset and for a target that names no matrix of this model.
    """
    from peft import LoraConfig, get_peft_model

    if preset not in LORA_TARGETS:
        raise ValueError(f"lora must be one of {', '.join(LORA_TARGETS)}, not {preset!r}")
    names = {
        name.rsplit(".", 1)[-1]
        for name, module in model.hf.named_modules()
        if isinstance(module, nn.Linear)
    }
    if absent := [target for target in LORA_TARGETS[preset] if target not in names]:
        raise ValueError(
            f"LoRA targets {absent} name no matrix of this model; it has {sorted(names)}"
        )
    lora = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=LORA_TARGETS[preset]
    )
    with torch.random.fork_rng(devices=[]):  # peft initialises from the global generator
        torch.default_generator.manual_seed(seed)
        model.hf = get_peft_model(model.hf, lora).eval()
    _adapted(model.to(model.device))


def _adapted(model: DiffusionLM) -> DiffusionLM:
    """The model, whose adapters leave the precision of their products to `precision`."""
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.cast_input_dtype_enabled = False
    return model


def shard(model: DiffusionLM) -> None:
    """Spreads the weights over the processes of a world, layer by layer (FSDP2); then no parts of
    it may be called by themselves.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(model.world.device, (model.world.size,))
    for part in (*model._base.model.layers, model):
        fully_shard(part, mesh=mesh)
    for name in ("logits", "hold", "held_logits"):
        register_fsdp_forward_method(model, name)


def reference_of(model: DiffusionLM):
    """The frozen policy of this moment as a denoiser: adapters switched off under LoRA, else a
    copy.
    """
    if not model.adapted:
        frozen = copy.deepcopy(model).requires_grad_(False)
        return torch.no_grad()(frozen)

    @torch.no_grad()
    def reference(batch, hidden):
        with model.hf.disable_adapter():
            return model(batch, hidden)

    return reference


def _device(name: str) -> str:
    """The device of that name; "auto" is cuda where there is one, else the CPU."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, and torch sees no GPU here: give cpu or auto")
    return name


def _assert_bidirectional(hf: nn.Module, name: str) -> None:
    """Raises unless the last token changes what the model says about the first."""
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]], device=hf.device)
    with torch.no_grad():
        first = hf(input_ids=ids, use_cache=False).logits[:, 0].float()
    if torch.equal(first[0], first[1]):
        raise ValueError(
            f"{name} is causal: a diffusion model needs bidirectional attention (config.is_causal = false)"
        )
