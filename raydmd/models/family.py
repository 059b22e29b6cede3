"""A family of pipelines: what the rest of the house may ask of one. Knows no Ray."""

from __future__ import annotations

import math
from abc import abstractmethod
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from raydmd.errors import InputError
from raydmd.models.base import Denoiser, Routing, Shape
from raydmd.models.encoding import Encoding
from raydmd.models.fusing import check_file, fuse
from raydmd.models.hollow import hollow
from raydmd.models.places import check_part
from raydmd.models.reading import understood
from raydmd.models.sizes import image_shape
from raydmd.models.usage import usage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from raydmd import recipe as recipes
    from raydmd.models.autoencoder import Autoencoder
    from raydmd.models.base import Rescale
    from raydmd.process import Prediction, Process
    from raydmd.recipe_method import Method
    from raydmd.recipe_training import Training


class Family(Encoding):
    """One family of pipelines, bound to one folder or hub id. Nothing else knows diffusers.

    Args:
        settings: the recipe's ``model`` section, with ``path`` a folder or hub id.
        index: its ``model_index.json``.

    Attributes:
        process: its noise process.
        prediction: what its networks predict.
        autoencoder: between pixels and latents.
    """

    network: str = "transformer"
    """What the pipeline calls its denoiser."""
    process: Process
    prediction: Prediction
    autoencoder: Autoencoder
    adapters: bool = True
    """Its network can be given adapters."""
    text_width: str = ""
    """Key of its network's config with the width of a prompt's tokens; empty where prompts are numbers of classes."""
    masked: bool = False
    """Its conditions have a mask."""
    pictures: bool = False
    """Its prompts have pictures."""
    asked: str = '"your prompt"'
    """What a model card's code asks the stock pipeline for."""
    rescale: Rescale | None = None
    """What its pipeline does to a guided prediction beside :class:`~raydmd.guidance.Guidance`."""
    _shape: Shape
    _fit: Callable[..., Shape]

    def __init__(self, settings: recipes.Model, index: Mapping[str, Any]) -> None:
        self.path = settings.path
        self._settings = settings
        self._index = index
        self._without_weights = False
        networks = [name for name in index if name.startswith(self.network) and self._has(name)]
        if wrong := sorted(settings.lora.keys() - set(networks)):
            raise InputError(
                f"model.lora names {', '.join(wrong)}; the networks of {self.path!r} are {', '.join(networks)}"
            )
        for file in settings.lora.values():  # its matrices are looked at where the network is
            check_file(Path(file))

    @abstractmethod
    def denoiser(self, expert: str, *, dtype: torch.dtype, autocast: torch.dtype = torch.float32) -> Denoiser:
        """Load one expert's weights.

        Args:
            expert: one of the routing's.
            dtype: of the parameters.
            autocast: of the forward pass; fp32 runs in the parameters' own dtype.

        Raises:
            InputError: if the weights are missing or unreadable.
        """

    @abstractmethod
    def scheduler(self, *, steps: int, shift: float, stochastic: bool) -> Any:
        """The stock scheduler that walks a student's times exactly.

        ``stochastic`` sets one that puts fresh noise on each predicted x0.
        """

    def routing(self) -> Routing:
        """The teacher's experts."""
        return Routing((self.network,))

    def shape(self) -> Shape:
        """Shape of one sample."""
        return self._shape

    def sized(self, height: int | None, width: int | None, frames: int | None, *, key: str = "model") -> Shape:
        """Shape of one sample of another size, in pixels; what is ``None`` is the pipeline's own.

        Args:
            height: of a picture or frame.
            width: of it.
            frames: of a clip; 1 for images.
            key: of the recipe, which they come from; for messages.

        Raises:
            InputError: if the networks can't make it.
        """
        return self._fit(height=height, width=width, frames=frames, key=key)

    def prompt_tokens(self, lengths: Mapping[str, int]) -> int:
        """Tokens of a prompt as the network sees it; where prompts are as long as they are, the most.

        Args:
            lengths: those that are known without a tokenizer: ``text``, and ``clip`` where there is one beside it.
        """
        return lengths.get("text") or self.text_length() if self.text_width else 1

    def pooled_width(self) -> int | None:
        """Width of a prompt's pooled vector; ``None`` where the network takes none."""
        width: int | None = self._config(self._kind(), self.routing().experts[0]).get("pooled_projection_dim")
        return width

    def experts_held(self) -> tuple[str, ...]:
        """Experts that the pipeline class has a place for."""
        return (self.network,)

    def check(self, method: Method) -> None:
        """Refuse a method that this pipeline cannot be trained or sampled with.

        Raises:
            InputError: naming the key.
        """
        del method  # of a flow model every grid has a stock scheduler

    @contextmanager
    def without_weights(self, yes: bool = True) -> Iterator[None]:
        """Networks loaded meanwhile are as they would be but for their parameters, which are on the meta device."""
        before, self._without_weights = self._without_weights, yes
        try:
            yield
        finally:
            self._without_weights = before

    def notes(self, method: Method) -> list[str]:
        """What is no fault, but should be known before a run."""
        told = self._config(FlowMatchEulerDiscreteScheduler, "scheduler") if self._has("scheduler") else {}
        shift = None if told.get("use_dynamic_shifting") else told.get("flow_shift") or told.get("shift")
        if shift is None or math.isclose(shift, method.shift):
            return []
        return [
            f"the scheduler of {self.path!r} has shift {shift:g}, method.shift={method.shift:g}: the latter holds for "
            "all roles here, teacher, fake score and student, and for the exported scheduler"
        ]

    def check_roles(self, training: Training) -> None:
        """Refuse adapters on a network that diffusers can give none.

        Raises:
            InputError: naming the key.
        """
        for role in ("student", "fake"):
            if not self.adapters and getattr(training, role).lora is not None:
                raise InputError(
                    f"training.{role}.lora does not fit {self.path!r}: in diffusers the network of a "
                    f"{self.pipeline.__name__} takes no adapters. Set training.{role}.lora=null"
                )

    def check_spread(self, gpus: float) -> None:
        """Refuse replicas of several GPUs for a network that diffusers can't cut into blocks.

        Raises:
            InputError: naming the key.
        """
        if gpus > 1 and not (kind := self._kind())._no_split_modules:
            raise InputError(
                f"placement.teacher_gpus={gpus:g} does not fit {self.path!r}: diffusers does not say where a "
                f"{kind.__name__} can be cut. Set placement.teacher_gpus=1"
            )

    def tokens(self, latent: tuple[int, ...]) -> tuple[int, ...]:
        """Lengths of a sample's sequences that ranks share under sequence parallelism; none if they can't."""
        del latent
        return ()

    def attention(self) -> tuple[int, int]:
        """Attention blocks whose tokens ranks share under sequence parallelism, and how wide a token is there."""
        config = self._config(self._kind(), self.routing().experts[0])
        return config["num_layers"], config["num_attention_heads"] * config["attention_head_dim"]

    def check_sequence(self, size: int, latents: Iterable[tuple[int, ...]] = ()) -> None:
        """Refuse groups of ranks that can't share a sample.

        Args:
            size: ranks of a group.
            latents: shapes of one latent that samples have beside the family's own.

        Raises:
            InputError: saying what does not divide.
        """
        if size == 1:
            return
        why = f"raydmd can't split the tokens of a {self.pipeline.__name__}"
        own = self._shape.latent
        if self.tokens(own):
            heads = self._config(self._kind(), self.network)["num_attention_heads"]
            counts = [(heads, "attention heads"), *((n, "tokens") for n in self.tokens(own))]
            for latent in latents:
                counts += [(n, f"tokens of latents {latent}") for n in self.tokens(latent) if latent != own]
            odd = [f"{count} {name}" for count, name in counts if count % size]
            if not odd:
                return
            why = f"{' and '.join(odd)} do not divide by it"
        raise InputError(f"placement.sequence={size} does not fit {self.path!r}: {why}. Set placement.sequence=1")

    def fresh(self, generator: torch.Generator) -> Tensor:
        """Noise ``(1, *latent)`` as the stock scheduler draws it between steps."""
        return torch.randn((1, *self._shape.latent), generator=generator)

    def render(self, latents: Tensor) -> Tensor:
        """Pixels from normalised latents, differentiable and not clamped: ``(B, frames, 3, H, W)``, fp32.

        An image is one frame. In [0, 1] but for where the decoder overshoots; there a clamp would end the gradient.
        The decoder itself is frozen.
        """
        return self.autoencoder.render(latents)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Pixels in [0, 1] from normalised latents: ``(B, frames, 3, H, W)``, fp32, without gradient."""
        return self.render(latents).clamp(0, 1)

    def encode_pixels(self, pixels: Tensor) -> Tensor:
        """Normalised latents ``(B, *latent)`` of pixels in [0, 1], ``(B, frames, 3, H, W)``; fp32, without noise."""
        return self.autoencoder.encode(pixels)

    def export(
        self,
        folder: Path,
        experts: Mapping[str, nn.Module],
        *,
        steps: int,
        shift: float,
        boundaries: tuple[float, ...],
        stochastic: bool,
    ) -> None:
        """Write the student as a stock diffusers pipeline with its few-step scheduler set.

        Experts that the pipeline has no place for lie beside it; :meth:`usage` says how they take turns.
        """
        pipeline = self._text_pipeline()
        parts = {name: module for name, module in experts.items() if name in self.experts_held()}
        scheduler = self.scheduler(steps=steps, shift=shift, stochastic=stochastic)
        vae = self.autoencoder.stock()
        pipeline.register_modules(scheduler=scheduler, **parts, **({} if vae is None else {"vae": vae}))
        self._configure(pipeline, boundaries)
        pipeline.save_pretrained(folder, safe_serialization=True)
        for name, module in experts.items():
            if name not in parts:
                save: Any = module.save_pretrained
                save(folder / name, safe_serialization=True)

    def _configure(self, pipeline: Any, boundaries: tuple[float, ...]) -> None:
        """Set what else ``model_index.json`` must say of a student."""
        del pipeline, boundaries

    def export_lora(
        self,
        folder: Path,
        layers: Mapping[str, Mapping[str, Tensor]],
        metadata: Mapping[str, Mapping[str, Any]],
    ) -> None:
        """Write adapters, one mapping per expert under peft's names, in diffusers' naming.

        A file for each expert: the stock loaders take one expert a file.
        """
        for expert, weights in layers.items():
            named = {
                f"{self.network}_lora_layers": dict(weights),
                f"{self.network}_lora_adapter_metadata": dict(metadata[expert]),
            }
            self.pipeline.save_lora_weights(folder, weight_name=f"{expert}.safetensors", **named)

    def sampling(self, *, steps: int) -> dict[str, Any]:
        """What a call of an exported student's stock pipeline needs beside its prompt."""
        size = {"height": self._shape.height, "width": self._shape.width}
        return {"num_inference_steps": steps, "guidance_scale": 1.0, **size}

    def absent(self) -> tuple[str, ...]:
        """Parts that the stock pipeline must be told are not there."""
        return tuple(part for part in self.text_parts if not self._has(part))

    def usage(self, *, steps: int, beside: Mapping[str, int] | None = None, kind: str = "") -> str:
        """Python that samples an exported student with stock diffusers, for its model card.

        Args:
            steps: of the student.
            beside: experts that the pipeline has no place for, and the step that each begins with.
            kind: diffusers' class of the experts.
        """
        return usage(
            self.pipeline.__name__,
            self.network,
            self.asked,
            self.sampling(steps=steps),
            self.absent(),
            steps=steps,
            beside=beside,
            kind=kind,
        )

    @property
    def revision(self) -> dict[str, str]:
        """Keywords of ``from_pretrained`` that name the weights' revision."""
        return {"revision": self._settings.revision} if self._settings.revision else {}

    def _image(self, **limits: Any) -> Shape:
        """The shape of an image family's samples; ``limits`` of :func:`image_shape` hold for all its sizes."""
        self._fit = partial(image_shape, path=self.path, scale=self.autoencoder.scale, **limits)
        return self.sized(self._settings.height, self._settings.width, self._settings.frames)

    def _kind(self) -> Any:
        """The diffusers class of its network."""
        return getattr(diffusers, self._index[self.network][1])

    def _config(self, kind: Any, part: str) -> dict[str, Any]:
        """A part's settings."""
        found: dict[str, Any] = kind.load_config(self.path, subfolder=part, **self.revision)
        return found

    def _load(self, kind: Any, part: str, *, dtype: torch.dtype = torch.float32) -> Any:
        """A part's weights, or ``None`` where the pipeline has no such part."""
        if not self._has(part):
            return None
        if self._without_weights:
            return hollow(kind, self._config(kind, part), dtype)
        check_part(self.path, part)
        with understood(f"model {self.path!r}, {part}"):
            loaded = kind.from_pretrained(
                self.path, subfolder=part, torch_dtype=dtype, use_safetensors=True, **self.revision
            )
        if part in self._settings.lora:
            fuse(self.pipeline, loaded, Path(self._settings.lora[part]), prefix=self.network)
        return loaded

    def _tokenizer(self, part: str = "tokenizer") -> Any:
        """A tokenizer, or ``None`` where the pipeline has none of that name."""
        from transformers import AutoTokenizer

        if not self._has(part):
            return None
        with understood(f"model {self.path!r}, {part}"):
            return AutoTokenizer.from_pretrained(self.path, subfolder=part, trust_remote_code=False, **self.revision)

    def _length(self, most: int, part: str = "tokenizer") -> int:
        """The recipe's ``model.text_length``; else the tokenizer's limit, but ``most``."""
        if self._settings.text_length:
            return self._settings.text_length
        tokenizer = self._tokenizer(part)
        with understood(f"model {self.path!r}, {part}"):
            return min(most, int(tokenizer.model_max_length)) if tokenizer else most

    def _has(self, part: str) -> bool:
        entry = self._index.get(part)
        return bool(entry and entry[0])

    def _require(self, *parts: str) -> None:
        missing = [part for part in parts if not self._has(part)]
        if missing:
            raise InputError(f"model {self.path!r} has no {', '.join(missing)}; a whole pipeline is needed")
