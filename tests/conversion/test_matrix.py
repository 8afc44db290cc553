"""The matrix of architectures: every class of Transformers' tables as a tiny model, converted and tried.

    pytest -m slow tests/test_matrix.py     # the whole matrix, against the recorded hf_rfa/supported.json

The default run tries a sample of unlike families.
"""

import paths
import pytest
import transformers
from matrix_checks import TOLERANCE, check_model, inputs_for, outputs_of, packing_error
from tiny_models import Case, all_cases, tiny_model

from hf_rfa import supported
from hf_rfa.supported import CONVERTS, NOT_TRIED, REFUSED, Architecture, Matrix

SAMPLE = [
    Case("causal_lm", "gpt2", "GPT2LMHeadModel"),  # learned positions, queries, keys and values in one matrix
    Case("causal_lm", "diffllama", "DiffLlamaForCausalLM"),  # attends twice in a forward
    Case("causal_lm", "deepseek_v2", "DeepseekV2ForCausalLM"),  # latent attention, values of another dim, experts
    Case("causal_lm", "flint", "FlintForCausalLM"),  # sliding windows, learned sinks
    Case("causal_lm", "llama4_text", "Llama4ForCausalLM"),  # chunked attention
    Case("causal_lm", "gemma3n_text", "Gemma3nForCausalLM"),  # layers that share keys and values
    Case("causal_lm", "gemma4_text", "Gemma4ForCausalLM"),  # the same, with heads of two dims
    Case("causal_lm", "qwen3_next", "Qwen3NextForCausalLM"),  # linear attention between
    Case("causal_lm", "bamba", "BambaForCausalLM"),  # recurrent layers between
    Case("causal_lm", "falcon_h1", "FalconH1ForCausalLM"),  # a recurrence beside the attention
    Case("causal_lm", "biogpt", "BioGptForCausalLM"),  # packing is ignored by Transformers
    Case("masked_lm", "distilbert", "DistilBertForMaskedLM"),  # sees both sides
    Case("seq_to_seq_causal_lm", "m2m_100", "M2M100ForConditionalGeneration"),  # cross-attention
    Case("encoder", "clip", "CLIPModel"),  # two towers
    Case("speech_seq_2_seq", "whisper", "WhisperForConditionalGeneration"),  # sounds
]
#: What the refusals of the matrix name.
FEATURES = (
    "attention of its own",
    "some of its attention outside",
    "an indexer chooses",
    "soft-capping",
    "a position bias",
    "works on its attention masks itself",
    "takes its attention mask apart",
    "masks of one's own (4-D)",
    "No layer",
)
#: What the families that people name must come to; the rest is what it is found to be.
MUST_CONVERT = """
    LlamaForCausalLM MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM GemmaForCausalLM
    Gemma3ForCausalLM Gemma3nForCausalLM Gemma4ForCausalLM GPTJForCausalLM Qwen3NextForCausalLM
    PhiForCausalLM Phi3ForCausalLM GptOssForCausalLM GPT2LMHeadModel GPTNeoXForCausalLM
    OPTForCausalLM DeepseekV3ForCausalLM Llama4ForCausalLM MixtralForCausalLM Olmo2ForCausalLM CohereForCausalLM
    GraniteForCausalLM JambaForCausalLM BartForConditionalGeneration WhisperForConditionalGeneration BertForMaskedLM
    RobertaForMaskedLM ModernBertForMaskedLM CLIPModel ViTModel Wav2Vec2Model Qwen2_5_VLModel LlavaModel
""".split()


def tried(case: Case) -> Architecture:
    """The matrix's row of a class; any exception after the original's own forward, but a refusal, is a defect."""
    try:
        model = tiny_model(case)
        outputs_of(model, inputs_for(model))
    except Exception as error:  # whatever the unconverted class raises: its row says so
        words = " ".join(str(error).split())
        return _row(case, NOT_TRIED, f"no tiny model that runs: {type(error).__name__}: {words}"[:200], {})
    endings = check_model(model)
    if list(endings) == ["convert"]:
        return _row(case, REFUSED, endings["convert"], {})
    return _row(case, CONVERTS, "", {stage: ending for stage, ending in endings.items() if ending != "ok"})


def _row(case: Case, outcome: str, reason: str, stages: dict[str, str]) -> Architecture:
    return Architecture(case.model_type, case.class_name, case.table, outcome, reason, stages)


#: Model types of the sample whose packed documents only newer versions of Transformers than the lowest get right.
COUNTED_OVER_THE_ROW = {"llama4_text": "this Transformers counts the chunks of packed documents over the whole row"}


@pytest.mark.parametrize("case", SAMPLE, ids=str)
def test_a_family_does_everything_that_the_matrix_says(case):
    if case not in all_cases():
        pytest.skip("this Transformers has no such class")
    if case.model_type in COUNTED_OVER_THE_ROW and packing_error(tiny_model(case)) > TOLERANCE:
        pytest.skip(COUNTED_OVER_THE_ROW[case.model_type])
    row = tried(case)
    assert row.outcome == CONVERTS, row.reason
    if supported.read_matrix().transformers == transformers.__version__:
        assert row in supported.read_matrix().architectures


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of models, about themselves
def test_the_whole_matrix(tmp_path):
    rows, defects = [], []
    for case in all_cases():
        try:
            rows.append(tried(case))
        except Exception as error:
            defects.append(f"{case}: {type(error).__name__}: {error} {getattr(error, '__notes__', '')}")
    matrix = Matrix(transformers.__version__, tuple(rows))
    written = tmp_path / supported.MATRIX_FILE
    written.write_text(supported.write_matrix(matrix), encoding="utf-8")
    print({outcome: matrix.count(outcome) for outcome in supported.OUTCOMES}, "written to", written)
    assert not defects, "\n".join(defects)
    assert matrix == supported.read_matrix(), f"not as recorded: look at the difference, then copy {written}"


# --- the recorded matrix ---------------------------------------------------------------------------------------------


def test_every_refusal_names_the_feature():
    unnamed = [
        row
        for row in supported.find(supported.read_matrix(), outcome=REFUSED)
        if not any(feature in row.reason for feature in FEATURES)
    ]
    assert not unnamed


def test_the_families_that_people_name_convert():
    converted = {row.model_class for row in supported.find(supported.read_matrix(), outcome=CONVERTS)}
    assert not set(MUST_CONVERT) - converted


def test_the_matrix_holds_every_class_of_transformers_tables():
    matrix = supported.read_matrix()
    if matrix.transformers == transformers.__version__:
        rows = [(row.table, row.model_type, row.model_class) for row in matrix.architectures]
        assert rows == [(case.table, case.model_type, case.class_name) for case in all_cases()]


#: Classes whose own survey says that they route all of their attention through the interface; not in the repository.
SURVEY = paths.SHARED / "architectures.tsv"
_TABLES = {"seq2seq": "seq_to_seq_causal_lm", "seq2seq_speech": "speech_seq_2_seq", "encoder_extra": "encoder"}


@pytest.mark.skipif(not SURVEY.exists(), reason="the survey of architectures is not beside the repository")
def test_the_counts_of_the_survey():
    """All classes that hand over nothing unusual convert, and at least 215 of the 241 that route everything."""
    rows = [line.split("\t") for line in SURVEY.read_text().splitlines() if not line.startswith("#")]
    outcomes = {
        (row.table, row.model_type, row.model_class): row.outcome for row in supported.read_matrix().architectures
    }
    routed = {
        (_TABLES.get(table, table), kind, name): needs
        for table, kind, name, routed, _, needs, *_ in rows
        if routed.startswith("full")
    }
    plain = [key for key, needs in routed.items() if needs == "-"]
    assert (len(routed), len(plain)) == (241, 176)
    converted = [key for key in routed if outcomes[key] == CONVERTS]
    print(f"{sum(key in converted for key in plain)} of {len(plain)} plain, {len(converted)} of {len(routed)} in all")
    assert len(converted) >= 215
    # What it chooses with an indexer it folds into the mask, which that survey did not look for.
    assert {kind for _, kind, _ in set(plain) - set(converted)} <= {"qwen4_exp", "qwen4_exp_text"}
