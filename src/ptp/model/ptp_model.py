"""PTPModel: a frozen causal language model, a gated LoRA and an embedding of u (METHOD §2).

Shapes: B rows, S context tokens, N windows of L positions, H hidden size, V vocabulary, T positions of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ptp.attention import FLEX, Mask, layer_masks, open_layers
from ptp.cache import PassCache
from ptp.calibration import Calibration
from ptp.config import PTPConfig
from ptp.errors import AdapterError
from ptp.layer_kinds import context_length
from ptp.model.adapter import (
    AdapterSettings,
    find_adapter,
    fingerprint,
    load_weights,
    lora_parameters,
    read_settings,
    refer_to_base_model,
    resolve_base_model,
    save_adapter,
    weights_hash,
)
from ptp.model.architectures import check_architecture, check_calls
from ptp.model.auxiliary import make_auxiliary_embedding
from ptp.model.checkpointing import checkpointed
from ptp.model.gated_lora import Gate, add_gated_lora
from ptp.model.head import layers_of, project
from ptp.model.hub import upload
from ptp.model.loading import load_base_model, to_dtype
from ptp.model.masks import context_mask, window_mask
from ptp.model.proposal import Blur, Chain, Continuation
from ptp.model.repository import write_repository
from ptp.sampling import SamplingRule, inside, row_intervals, token_intervals


@dataclass(frozen=True)
class TrainingPass:
    """Result of a training pass.

    windows: (B, N·L, H), context: (B, S, H), hidden states of the windows and of the context they stand behind, which
    `PTPModel.logits` makes logits of. u: (B, N, ≥ L), drawn in the intervals. mass: (B, S) bool, whether a token of a
    span has an interval.
    """

    windows: Tensor
    context: Tensor
    u: Tensor
    mass: Tensor


class PTPModel(nn.Module):
    """Wraps any causal LM; the base model's linear layers are replaced in place by gated ones.

    With the gate shut the model is the base model, bit for bit. Only what is added trains: the LoRA, the embedding
    of u, and what makes proposals of the states of windows.
    """

    learns_to_read = False
    """Whether the context pass of training has gradient; that of a frozen base model has none."""

    gradient_checkpointing = False
    """Whether training passes keep of each layer what enters it only, and compute the rest again (less memory)."""

    def __init__(self, base_model: PreTrainedModel, config: PTPConfig | None = None) -> None:
        super().__init__()
        self.ptp_config = config or PTPConfig()
        check_architecture(base_model.config)
        self.base_model = base_model
        self.layer_kinds = open_layers(base_model)
        self.gate = Gate()
        self.prepare_weights()
        check_calls(base_model, self.gate)
        tokens, config = self.token_embedding.weight, self.ptp_config
        hidden_size = tokens.shape[1]
        self._first_scale = float(_root_mean_square(tokens))
        self.auxiliary = make_auxiliary_embedding(
            config.auxiliary, config.auxiliary_size, hidden_size, self._first_scale
        ).to(tokens.device)
        chains, blurs = config.chain > 0, config.picks_softly
        self.chain = Chain(config.chain, config.chain_size, hidden_size).to(tokens.device) if chains else None
        self.blur = Blur(hidden_size).to(tokens.device) if blurs else None
        continues = config.continues
        self.continuation = Continuation(config.window, hidden_size).to(tokens.device) if continues else None
        self.base_fingerprint = fingerprint(base_model)
        self.rule: SamplingRule | None = None
        self.survival: tuple[float, ...] = tuple(0.5**k for k in range(1, self.ptp_config.num_drafts + 1))
        self.continued: tuple[float, ...] = tuple(0.4**k for k in range(1, config.window + 1)) if continues else ()
        self.second = 0.2 if config.num_candidates > 1 else 0.0
        self.calibration = Calibration()
        self.source: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        directory: str | Path,
        base_model: PreTrainedModel | None = None,
        dtype: str | torch.dtype = "auto",
        *,
        revision: str | None = None,
        token: str | bool | None = None,
    ) -> PTPModel:
        """Load an adapter or experiment directory, or an adapter's hub id, with the base model it names or a given one.

        The adapter takes the base model's dtype. revision, token: the hub's. Raises `AdapterError` if there is no valid
        adapter or it was made for another base model.
        """
        adapter = find_adapter(directory, revision=revision, token=token)
        settings = read_settings(adapter)
        check_decodable(settings.config)
        given = base_model is not None
        if base_model is None:
            # The fingerprint is that of the checkpoint's own dtype; float16 would round some values otherwise.
            base_model = load_base_model(resolve_base_model(adapter, settings.base_model))
        found = fingerprint(base_model)
        if found != settings.base_fingerprint:
            raise AdapterError(
                f"the adapter in {adapter} was made for {settings.base_model} ({settings.base_fingerprint[:12]}); "
                f"got {base_model.config.name_or_path or 'another model'} ({found[:12]})"
            )
        model = cls(base_model if given else to_dtype(base_model, dtype), settings.config)
        model.load_adapter(adapter)
        model.rule, model.calibration = settings.rule, settings.calibration
        model.survival, model.continued, model.second = settings.survival, settings.continued, settings.second
        model.base_fingerprint = found
        # Not the base model's own, of which some stay in float32 in models of half precision.
        for parameter in [*lora_parameters(model.base_model), *model.added_weights().values()]:
            parameter.data = parameter.data.to(model.dtype)
        model.source = adapter
        return model.eval()

    def prepare_weights(self) -> None:
        """Freeze the base model and give it a gated LoRA, which is to train."""
        config = self.ptp_config
        self.base_model.requires_grad_(False)
        add_gated_lora(self.base_model, config.lora_targets, config.lora_rank, config.lora_alpha, self.gate)

    def train(self, mode: bool = True) -> Self:
        """Training mode, but no dropout in a frozen base model: windows learn behind the keys they will decode with."""
        super().train(mode)
        self.base_model.train(mode and self.learns_to_read)
        return self

    def load_adapter(self, adapter: Path) -> None:
        """Fill what trains from an adapter directory; every key and shape must match."""
        load_weights(adapter, self.base_model, self.added_weights(), self.ptp_config)

    def added_weights(self) -> dict[str, nn.Parameter]:
        """What is trained beside the LoRA, by the names it has in files."""
        parts = {"": self.auxiliary, "chain.": self.chain, "blur.": self.blur, "continuation.": self.continuation}
        return {
            f"{prefix}{name}": parameter
            for prefix, part in parts.items()
            if part is not None
            for name, parameter in part.named_parameters()
        }

    def save_pretrained(self, directory: str | Path, is_main_process: bool = True) -> None:
        """Write an adapter directory (see `ptp.model.adapter`); of several processes, the main one does."""
        directory = Path(directory)
        save_adapter(directory, self.base_model, self.added_weights(), self.settings(directory), is_main_process)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        base_model: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
    ) -> str:
        """Put the adapter into a repository of the hub, with a model card; returns the commit's address.

        The card shows what was measured of these very weights where they were loaded from, and nothing else.
        base_model: the base model's hub id, needed if it was loaded from a path. Raises `AdapterError`.
        """
        with TemporaryDirectory() as temporary:
            saved, folder = Path(temporary) / "adapter", Path(temporary) / "repository"
            self.save_pretrained(saved)
            unchanged = self.source is not None and weights_hash(self.source) == weights_hash(saved)
            write_repository(cast(Path, self.source) if unchanged else saved, folder, repo_id, base_model)
            return upload(folder, repo_id, private, token)

    def settings(self, directory: Path) -> AdapterSettings:
        """What ptp_config.json says of this model in an adapter directory."""
        return AdapterSettings(
            base_model=refer_to_base_model(directory, self.base_name),
            base_fingerprint=self.base_fingerprint,
            config=self.ptp_config,
            rule=self.rule,
            survival=self.survival,
            continued=self.continued,
            second=self.second,
            calibration=self.calibration,
        )

    @property
    def base_name(self) -> str:
        """Hub id or path of the base model; empty for one made in memory."""
        return self.base_model.config.name_or_path or ""

    @property
    def num_layers(self) -> int:
        return self.base_model.config.get_text_config().num_hidden_layers

    @property
    def sees_all(self) -> bool:
        """Whether every layer sees the whole text."""
        return all(kind.is_full for kind in self.layer_kinds)

    @property
    def token_embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.base_model.get_input_embeddings())

    @property
    def embedding_scale(self) -> float | Tensor:
        """Size of the token embeddings' numbers; of embeddings that learn, as they are now."""
        return _root_mean_square(self.token_embedding.weight) if self.learns_to_read else self._first_scale

    @property
    def device(self) -> torch.device:
        return self.token_embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.token_embedding.weight.dtype

    def embed_u(self, u: Tensor) -> Tensor:
        """Auxiliary embeddings of u (...), (..., H) in the base model's dtype."""
        return self.auxiliary(u).to(self.dtype)

    def add_anchor(self, embedded: Tensor, anchor: Tensor, first: Tensor) -> Tensor:
        """Inputs of window positions, (..., H).

        embedded: (..., H), the embedded u of each position. anchor: (...) int64, last context token of the
        position's window. first: (...) bool, whether the position is its window's first.
        """
        if self.ptp_config.anchor == "none":
            return embedded
        token = self.token_embedding(anchor)
        return embedded + (token if self.ptp_config.anchor == "all" else token * first.unsqueeze(-1))

    def chained(self, states: Tensor, before: Tensor) -> Tensor:
        """States (..., H) of window positions, corrected by the tokens before those that they are to propose.

        before: (..., chain) int64, the nearest first, `UNKNOWN` where there is none. Without a chain, as they are.
        """
        if self.chain is None:
            return states
        known = (before >= 0).unsqueeze(-1)
        return self.chain(states, self.token_embedding(before.clamp(min=0)) * known / self.embedding_scale)

    def read(
        self,
        inputs: Tensor,
        positions: Tensor,
        mask: Mask | Tensor | None,
        cache: Cache,
        gate_start: int | None = None,
        layers: Callable[..., Any] | None = None,
        key_positions: Tensor | None = None,
    ) -> Tensor:
        """One forward call of the layers on top of a cache, gate open from `gate_start` on. Returns states (B, T, H).

        inputs: (B, T) token ids or (B, T, H) embeddings; positions: (B, T); mask: what each may see of the cached and
        the own positions, None for everything; `logits` are made of what comes back. layers: the base model's layers
        in another form, such as compiled. key_positions: (B, cached + T), of what the mask is about; by default the
        cache holds positions 0, 1 and so on.
        """
        checkpoints = self.gradient_checkpointing and torch.is_grad_enabled()
        with (
            self.gate.opened(gate_start, inputs.shape[1]),
            checkpointed(self.base_model, self.gate) if checkpoints else nullcontext(),
        ):
            named = self._named(inputs, positions, mask, cache, key_positions)
            run = layers_of(self.base_model) if layers is None else layers
            return run(**named).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) of hidden states (..., H)."""
        return project(self.base_model, hidden)

    def _named(
        self,
        inputs: Tensor,
        positions: Tensor,
        mask: Mask | Tensor | None,
        cache: Cache,
        key_positions: Tensor | None,
    ) -> dict[str, Any]:
        return {
            "inputs_embeds" if inputs.is_floating_point() else "input_ids": inputs,
            "position_ids": positions,
            "attention_mask": layer_masks(self.base_model, mask, self.layer_kinds, positions, key_positions),
            "past_key_values": cache,
            "use_cache": True,
        }

    def forward(
        self,
        ids: Tensor,
        document: Tensor,
        positions: Tensor,
        span: Tensor,
        starts: Tensor,
        z: Tensor,
        lower: Tensor | None = None,
        upper: Tensor | None = None,
        inverse: bool = False,
        then: Callable[[TrainingPass], Any] | None = None,
    ) -> Any:
        """Context pass without gradient, then one gated pass over all windows (METHOD §3). Returns a `TrainingPass`.

        The fields of a `ptp.data.packing.PackedBatch`: ids, document, positions, span, lower, upper (B, S); starts
        (B, N); z (B, N, ≥ L), of which the first L are inputs. Where intervals are not given, they are those of the
        base model's own distributions under `self.rule`. `inverse` takes instead, for inverse autoregressive training,
        those of the distributions that the windows themselves predict (see `_own_u`). then: makes something else of the
        pass, which is returned; an engine that shards the weights (FSDP) has them at hand only inside this call.
        """
        cache = PassCache()
        with nullcontext() if self.learns_to_read else torch.no_grad():
            context = self.read(ids, positions, context_mask(document), cache)
        if inverse:
            u, mass = self._own_u(context, ids, document, positions, span, starts, z, cache), span >= 0
        else:
            if lower is None or upper is None:
                assert self.rule is not None, "intervals cannot be computed without a sampling rule"
                assert not (self.learns_to_read and self.training), (
                    "a student's own distributions are not its teacher's"
                )
                with torch.no_grad():
                    lower, upper = token_intervals(context, self.logits, ids, (span >= 0) & (positions > 0), self.rule)
            place, own = self._places(span, starts, z.shape[-1])
            u, mass = inside(_at(lower, place) * own, _at(upper, place) * own, z), upper > lower
        windows = self._read_in_parts(u[..., : self.ptp_config.window], ids, document, positions, starts, cache)
        output = TrainingPass(windows, context, u, mass)
        return output if then is None else then(output)

    @torch.no_grad()
    def _own_u(
        self,
        context: Tensor,
        ids: Tensor,
        document: Tensor,
        positions: Tensor,
        span: Tensor,
        starts: Tensor,
        z: Tensor,
        cache: PassCache,
    ) -> Tensor:
        """u (B, N, ≥ L), each in its token's interval under the model's own distribution, given the u before it.

        The context before a window gives the distribution of its first token, hence u_0, which is read for that of the
        next, hence u_1, and so on (METHOD §3). All windows are read together, one position of each at a time; their
        keys stand behind the context's, one window index after the other. Every token must have an interval, so the
        rule must not truncate: a model that has learnt nothing yet would truncate nearly all of them.
        """
        assert self.ptp_config.variant == "categorical", "a one-hot window has no distribution"
        assert self.rule is not None and self.rule.gives_all_tokens, f"not every token has an interval: {self.rule}"
        place, own = self._places(span, starts, z.shape[-1])
        tokens = _at(ids, place)
        growing, mask = cache.growing(), window_mask(document, starts, 1).dense()
        own_keys = mask[..., ids.shape[1] :]
        states = states_before(starts, context)
        drawn: list[Tensor] = []
        for k in range(z.shape[-1]):
            if k > 0:
                states = self._read_windows(drawn[-1].unsqueeze(-1), ids, positions, starts, mask, growing, index=k - 1)
                mask = torch.cat([mask, own_keys], dim=-1)
            lower, upper = row_intervals(states.flatten(0, 1), self.logits, tokens[..., k].flatten(), self.rule)
            u = inside(lower.view_as(starts), upper.view_as(starts), z[..., k])
            drawn.append(u * own[..., k])
        return torch.stack(drawn, dim=-1)

    @staticmethod
    def _places(span: Tensor, starts: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Packed index (B, N, length) of each window's tokens from its start on; and whether its span holds them."""
        index = starts.unsqueeze(-1) + torch.arange(length, device=starts.device)
        place = index.clamp(max=span.shape[1] - 1)
        return place, (_at(span, place) == span.gather(1, starts).unsqueeze(-1)) & (index < span.shape[1])

    def _read_in_parts(
        self, u: Tensor, ids: Tensor, document: Tensor, positions: Tensor, starts: Tensor, cache: PassCache
    ) -> Tensor:
        """The gated pass over windows of u (B, N, L), on top of the context's cache. Returns (B, N·L, H).

        A dense mask makes each window attend to all others, though it sees none of them. Each row's windows are
        therefore read in several rows, each of about half as many positions as the context has, so that the work grows
        with their number and not with its square. Flex attention leaves out by itself what a mask does.
        """
        num_rows, num_windows, window = u.shape
        parts = 1
        if self.base_model.config._attn_implementation != FLEX:
            parts = dividing(num_windows, -(-2 * num_windows * window // ids.shape[1]))
        ids, document, positions = (tensor.repeat_interleave(parts, dim=0) for tensor in (ids, document, positions))
        starts, u = starts.view(parts * num_rows, -1), u.reshape(parts * num_rows, -1, window)
        mask = window_mask(document, starts, window)
        windows = self._read_windows(u, ids, positions, starts, mask, PassCache(cache, parts))
        return windows.view(num_rows, num_windows * window, -1)

    def _read_windows(
        self,
        u: Tensor,
        ids: Tensor,
        positions: Tensor,
        starts: Tensor,
        mask: Mask | Tensor,
        cache: Cache,
        index: int = 0,
    ) -> Tensor:
        """The gated pass over positions of windows, those from `index` on, on top of a cache of all before them.

        u: (B, N, W), of W positions each. Returns (B, N·W, H).
        """
        window = u.shape[-1]
        offsets = index + torch.arange(window, device=starts.device)
        anchor = ids.gather(1, starts - 1).unsqueeze(-1).expand(-1, -1, window)
        inputs = self.add_anchor(self.embed_u(u), anchor, (offsets == 0).expand_as(anchor)).flatten(1, 2)
        reached = torch.arange(index + window, device=starts.device) + self.ptp_config.shift
        window_positions = positions.gather(1, starts).unsqueeze(-1) + reached
        if (longest := context_length(self.base_model.config)) is not None:
            # A window may run past the end of a document as long as the context; nothing there is trained.
            window_positions = window_positions.clamp(max=longest - 1)
        # Behind the context's keys stand those of the windows, one call after the other.
        earlier, own = (
            window_positions[..., :index].transpose(1, 2).flatten(1),
            window_positions[..., index:].flatten(1),
        )
        keys = torch.cat([positions, earlier, own], dim=1)
        return self.read(inputs, own, mask, cache, gate_start=0, key_positions=keys)


def _root_mean_square(values: Tensor) -> Tensor:
    return values.detach().float().square().mean().sqrt()


def dividing(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(divisor for divisor in range(min(number, most), 0, -1) if number % divisor == 0)


def states_before(starts: Tensor, context: Tensor) -> Tensor:
    """Of the context's hidden states (B, S, H), those that predict the first token of windows (B, N): (B, N, H)."""
    return context.gather(1, (starts - 1).unsqueeze(-1).expand(-1, -1, context.shape[-1]))


def _at(values: Tensor, place: Tensor) -> Tensor:
    """Values (B, S) at packed indices (B, N, …)."""
    return values.gather(1, place.flatten(1)).view_as(place)


def end_token_ids(base_model: PreTrainedModel) -> list[int]:
    """The end tokens of the model's generation config; many chat models have several."""
    eos = base_model.generation_config.eos_token_id
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def check_decodable(config: PTPConfig) -> None:
    """Raises `AdapterError` for a model all of whose weights train: no base model in it verifies what it drafts."""
    if config.student is not None:
        raise AdapterError(
            "a student trained from scratch is a separate drafter, which the decoder does not run yet; to decode, "
            "train an adapter with model.student=null"
        )
    if config.trained == "all":
        raise AdapterError(
            "a base model whose own weights were trained (model.trained=all) cannot verify what it drafts as the "
            "base model would; to decode, train an adapter with model.trained=lora"
        )
