"""The diffusion model: a Hugging Face transformer made bidirectional, scored and sampled through
one small wrapper.

Shapes: B sequences, P prompt tokens (left-padded), L completion tokens, V vocabulary.
Log-probabilities in nats.
"""

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from rspo_lab.batch import Batch
from rspo_lab.distributed import ALONE, whole
from rspo_lab.models.kv_cache import Held
from rspo_lab.models.vocabulary_head import head_logits, token_logp


class DiffusionLM(nn.Module):
    """A bidirectional transformer with its tokenizer, as a denoiser and as the sampler's logits.

    `forward(batch, hidden)` is the denoiser that estimators and oracle call; it puts the head on
    the hidden rows only. Ids that stand for no text (the mask, ids beyond the tokenizer) have
    probability 0 in scores and samples alike. Where a model's state at position i - 1 gives the
    logits of i (Dream), both shift; position 0 then keeps its own state.
    """

    hf: Any  # a transformers model or peft's; torch types what a module has as a tensor or a module
    tokenizer: Any
    mask_id: Any
    banned: Bool[Tensor, "V"]

    def __init__(self, hf: Any, tokenizer: PreTrainedTokenizerFast):
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
        banned[self.mask_id] = True  # pyright: ignore[reportArgumentType]
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
                cache=held,
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
    def _base(self) -> Any:
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
