"""Native transformers classes of masked diffusion models, registered for `from_pretrained`; no remote code."""

from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM


class LladaConfig(LlamaConfig):
    """LLaDA's architecture is Llama's without the causal mask (arXiv:2502.09992)."""

    model_type = "llada"
    is_causal = False  # a class attribute, so that it also holds where config.json lacks the key

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.is_causal = False
        self.use_cache = False


class LladaForMaskedLM(LlamaForCausalLM):
    config_class = LladaConfig


AutoConfig.register("llada", LladaConfig, exist_ok=True)
AutoModelForCausalLM.register(LladaConfig, LladaForMaskedLM, exist_ok=True)
