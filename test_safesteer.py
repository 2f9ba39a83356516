"""Claims about SafeSteer, on tiny random models, and one short run of the real program: pytest"""
import copy
import json
import runpy
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    GenerationConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

import safesteer
from safesteer import Settings

torch.set_num_threads(1)  # tiny models gain nothing from more
HERE = Path(__file__).resolve().parent
HARMFUL = safesteer.load_prompts(HERE / "data" / "harmful_train.jsonl")[::10]
HARMLESS = safesteer.load_prompts(HERE / "data" / "harmless_train.jsonl")[::10]
TESTS = {
    "harmful": HARMFUL, "harmless": HARMLESS, "borderline": HARMLESS[:3],
    "capability": ["1 + 1?", "1 + 2?"], "expected": ["2", "3"],
}
TEMPLATE = (  # with what makes real templates hard: a date, a default system turn, a thinking block
    "{% set today = strftime_now('%d %b %Y') %}<|im_start|>system\nToday is {{ today }}.<|im_end|>\n"
    "{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{{ turn['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}{% endif %}"
)
TRAINER = partial(
    trainers.BpeTrainer, vocab_size=1000, show_progress=False,
    special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)
FAMILIES = Qwen2Config, Qwen3Config, LlamaConfig, MistralConfig, Gemma2Config
FAST = Settings(
    epochs=2, batch_size=5, rollouts=1, micro_batch_size=8, max_new_tokens=6, samples=2, votes=20,
    safety_tokens=20, learning_rate=1e-3, lora=4, eval_max_new_tokens=5,
)


def but(**changes):
    return Settings(**vars(FAST) | changes)


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE tokenizer of 1000 tokens, trained on our own prompts, without a pad token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    openers = ["I'm sorry, I cannot. As an AI. Unfortunately Sorry"] * 9
    bpe.train_from_iterator(HARMFUL + HARMLESS + openers, TRAINER())
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", chat_template=TEMPLATE
    )


def tiny(tokenizer, config, **options):
    """A random model of five blocks, its vocabulary larger than the tokenizer's, that refuses HARMFUL
    alone. Its window, where it has one, is shorter than the prompts."""
    torch.manual_seed(0)
    if config is Qwen3MoeConfig:
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    config = config(
        vocab_size=1024, hidden_size=64, intermediate_size=96, num_hidden_layers=5,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, initializer_range=0.2,
        sliding_window=8, **options,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        _, states = safesteer.read_prompts(model, tokenizer, HARMFUL + HARMLESS)
        wanted = torch.tensor([30.0] * len(HARMFUL) + [-30.0] * len(HARMLESS))
        opener = safesteer.refusal_token_ids(tokenizer)[0]
        model.lm_head.weight[opener] = torch.linalg.pinv(states[:, 0, -1]) @ wanted
    return model.requires_grad_(False)


@pytest.fixture
def model(tokenizer):
    return tiny(tokenizer, Qwen2Config)


@pytest.fixture
def direction():
    return safesteer.RefusalDirection(torch.linspace(-1, 1, 64), layer=2)


# ===== Prompts =====
def test_the_data_are_what_their_readme_says_and_no_prompt_stands_twice():
    sets = {path.stem: safesteer.load_prompts(path) for path in (HERE / "data").glob("*.jsonl")}
    sizes = {"harmful_train": 100, "harmless_train": 160, "borderline_train": 100}
    for name in safesteer.COUNTED:
        sizes |= {f"{name}_test": 100, f"{name}_validation": 40 if name == "capability" else 50}
    assert {name: len(prompts) for name, prompts in sets.items()} == sizes
    assert len({x.lower() for prompts in sets.values() for x in prompts}) == sum(sizes.values())


@pytest.mark.parametrize("line", ["null", "[]", "5", "{", '{"instruction": null}', '{"a": 1}', ""])
def test_a_line_without_a_prompt_is_named(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"instruction": "[x] \u2028 y"}}\n{line}\n', "utf-8")
    with pytest.raises(ValueError, match="line 2"):
        safesteer.load_prompts(path)
    path.write_text('{"instruction": "[x] \u2028 y"}\n', "utf-8")
    assert safesteer.load_prompts(path) == ["[x] \u2028 y"]


def test_a_chat_is_padded_on_the_left_and_knows_neither_the_day_nor_thinking(tokenizer):
    batch = safesteer.encode_chat(tokenizer, ["Hi", "How far is the Moon?"])
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert mask[0, 0] == 0 and mask[:, -1].all() and mask[1].all()
    text = tokenizer.decode(ids[0][mask[0].bool()])
    assert text.endswith("<|im_start|>assistant\n") and "26 Jul 2024" in text


def test_refusal_openers_are_the_tokens_that_follow_a_chat_prompt(tokenizer):
    opened = [tokenizer.decode(i) for i in safesteer.refusal_token_ids(tokenizer)]
    assert opened == [tokenizer.decode(tokenizer(x).input_ids[0]) for x in ("A", "I", "S", "Un")]


@pytest.mark.parametrize("blank", ["", " "])
def test_refusal_openers_have_a_blank_where_the_template_teaches_one(blank):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")  # as in SentencePiece
    bpe.train_from_iterator(["I am Sorry As Unfortunately [INST] Hello [/INST] I"] * 9, TRAINER())
    template = (
        "{% for turn in messages %}{% if turn['role'] == 'user' %}[INST] {{ turn['content'] }} [/INST]"
        "{% else %}BLANK{{ turn['content'] }}{% endif %}{% endfor %}"
    ).replace("BLANK", blank)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, chat_template=template)
    opened = tokenizer.convert_ids_to_tokens(safesteer.refusal_token_ids(tokenizer))
    assert ("\u2581I" in opened) == (blank == " ") and ("I" in opened) == (blank == "")


# ===== Stage 1 =====
@pytest.mark.parametrize("config", [*FAMILIES, Gemma3TextConfig])
def test_a_prompts_numbers_do_not_depend_on_its_batch(tokenizer, config):
    model, prompts = tiny(tokenizer, config), HARMFUL[:3] + HARMLESS[:5]
    scores, states = safesteer.read_prompts(model, tokenizer, prompts)
    answers, _ = safesteer.sample_rollouts(model, tokenizer, prompts, 6, greedy=True)
    for i, prompt in enumerate(prompts):
        alone, state = safesteer.read_prompts(model, tokenizer, [prompt])
        torch.testing.assert_close(alone[0], scores[i], atol=1e-3, rtol=0)
        torch.testing.assert_close(state[0], states[i], atol=1e-3, rtol=0)
        answer, mask = safesteer.sample_rollouts(model, tokenizer, [prompt], 6, greedy=True)
        assert torch.equal(answer[mask], answers[i, : answer.shape[1]][mask[0]])


def test_a_score_is_the_log_odds_of_a_refusal(model, tokenizer):
    batch = safesteer.encode_chat(tokenizer, HARMLESS[:1])
    p = model(**batch).logits[0, -1].double().softmax(0)[safesteer.refusal_token_ids(tokenizer)].sum()
    score = safesteer.refusal_scores(model, tokenizer, HARMLESS[:1])[0].double()
    torch.testing.assert_close(score, p.logit(), atol=1e-3, rtol=1e-3)


def test_the_direction_is_the_plain_difference_of_means(model, tokenizer):
    harmful = HARMFUL + HARMLESS[:2]  # harmful in name only: the filter drops those two
    found = safesteer.find_refusal_direction(
        model, tokenizer, harmful, HARMLESS[:12] + HARMFUL[:2], HARMLESS[12:]
    )
    means = []
    for prompts in (HARMFUL, HARMLESS[:12]):
        alone = [
            model(**safesteer.encode_chat(tokenizer, [prompt]), output_hidden_states=True)
            .hidden_states[found.layer][0, found.position] for prompt in prompts
        ]
        means.append(torch.stack(alone).mean(0))
    torch.testing.assert_close(found.vector, means[0] - means[1], atol=1e-4, rtol=1e-4)
    assert found.vector.dtype == torch.float32 and found.layer < 4, "the last fifth is out"
    with safesteer.steer(model, found):
        steered = safesteer.refusal_scores(model, tokenizer, HARMLESS[12:])
    assert steered.mean().item() == pytest.approx(found.score, abs=1e-4)


def test_a_model_that_never_refuses_or_cannot_be_steered_is_told_so(model, tokenizer, monkeypatch):
    with pytest.raises(ValueError, match="refuses none"):
        safesteer.find_refusal_direction(model, tokenizer, HARMLESS, HARMLESS, HARMLESS)
    monkeypatch.setattr(safesteer, "steer", lambda model, direction: torch.no_grad())
    with pytest.raises(ValueError, match="cannot be steered"):
        safesteer.find_refusal_direction(model, tokenizer, HARMFUL, HARMLESS, HARMLESS)


@torch.no_grad()
def test_the_hook_adds_d_at_every_token_and_leaves_the_model_as_it_was(model, tokenizer, direction):
    ids, seen = safesteer.encode_chat(tokenizer, HARMLESS[:1])["input_ids"], []
    block = model.get_decoder().layers[direction.layer]

    def read(block, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    def prefill_and_decode():
        with block.register_forward_pre_hook(read, with_kwargs=True):
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            model(ids[:, -1:], past_key_values=cache)

    prefill_and_decode()
    with pytest.raises(RuntimeError, match="stop"), safesteer.steer(model, direction, 0.5):
        prefill_and_decode()
        raise RuntimeError("stop")
    prefill_and_decode()
    for base, steered, after in zip(seen[:2], seen[2:4], seen[4:], strict=True):
        added = (0.5 * direction.vector).expand_as(base)
        torch.testing.assert_close(steered - base, added, atol=1e-5, rtol=1e-5)
        assert torch.equal(base, after)


# ===== Rollouts =====
def test_a_completion_ends_with_its_first_end_of_turn(model, tokenizer):
    model.lm_head.weight[: len(tokenizer)] *= 0.02  # nearly uniform: turns end early and late
    ends = safesteer.end_of_turn_ids(model, tokenizer)
    model.lm_head.weight[ends] += model.lm_head.weight.std() * 0.5
    assert set(tokenizer.convert_ids_to_tokens(ends.tolist())) == {"<|im_end|>", "<|endoftext|>"}
    torch.manual_seed(1)
    completions, masks = safesteer.sample_rollouts(model, tokenizer, HARMLESS * 8, 200)
    assert completions.shape == masks.shape and masks.dtype == torch.bool
    for ids, mask in zip(completions, masks, strict=True):
        ids, length = ids[mask].tolist(), int(mask.sum())
        assert mask[:length].all() and not set(ids[:-1]) & set(ends.tolist())
        assert ids[-1] in ends or length == 200
    assert len(set(masks.sum(1).tolist())) > 5


def test_sampling_ignores_the_models_own_generation_config(model, tokenizer):
    own = GenerationConfig(
        do_sample=True, temperature=0.01, top_k=1, top_p=0.1, min_p=0.9, repetition_penalty=3.0,
        no_repeat_ngram_size=1, suppress_tokens=list(range(900)), min_new_tokens=5,
    )
    sampled = []
    for model.generation_config in (GenerationConfig(), own):
        for greedy in (False, True):
            torch.manual_seed(0)
            sampled.append(safesteer.sample_rollouts(model, tokenizer, HARMLESS, 8, greedy)[0])
    assert torch.equal(sampled[0], sampled[2]) and torch.equal(sampled[1], sampled[3])
    assert not torch.equal(sampled[0], sampled[1]) and model.generation_config is own


@torch.no_grad()
def test_completion_logits_predict_the_completion(model, tokenizer):
    completions, mask = safesteer.sample_rollouts(model, tokenizer, HARMLESS, 6, greedy=True)
    logits = safesteer.completion_logits(model, tokenizer, HARMLESS, completions, mask)
    assert logits.shape == (*completions.shape, 1024)
    assert torch.equal(logits.argmax(-1)[mask], completions[mask])


# ===== Stage 2 =====
def test_votes_are_what_a_plain_count_says():
    for seed in range(20):
        torch.manual_seed(seed)
        teacher, base = torch.randn(2, 6, 5, 40) * 3
        valid, ineligible = torch.rand(6, 5) < 0.7, torch.randperm(40)[:5]
        valid[0, 0] = True
        ids, votes = safesteer.vote_safety_tokens(teacher, base, valid, 12, 6, 0.01, ineligible)
        mean_prob = teacher.softmax(-1)[valid].mean(0)
        eligible = {v for v in range(40) if mean_prob[v] >= 0.01 and v not in ineligible.tolist()}
        count = Counter()
        for i, t in valid.nonzero().tolist():
            lift = teacher[i, t].log_softmax(-1) - base[i, t].log_softmax(-1)
            count.update(sorted(eligible, key=lambda v, lift=lift: -lift[v])[:6])
        assert votes.tolist() == [n for _, n in count.most_common(12)]
        assert all(count[i] == n for i, n in zip(ids.tolist(), votes.tolist(), strict=True))


def test_a_token_without_a_vote_is_no_safety_token():
    teacher, base, valid = torch.zeros(1, 1, 30), torch.zeros(1, 1, 30), torch.ones(1, 1).bool()
    teacher[..., :3] = 5.0
    ids, votes = safesteer.vote_safety_tokens(teacher, base, valid, 10, 3)
    assert sorted(ids.tolist()) == [0, 1, 2] and votes.tolist() == [1, 1, 1]


def test_no_special_or_unused_id_and_no_refused_prompt_elects(model, tokenizer, direction):
    torch.manual_seed(0)
    model.lm_head.weight[len(tokenizer) :] += direction.vector  # d lifts those above all
    model.lm_head.weight[tokenizer.all_special_ids] += direction.vector
    ids, votes = safesteer.select_safety_tokens(model, tokenizer, direction, HARMLESS + HARMFUL, FAST)
    assert len(ids) == 20 and max(ids.tolist()) < len(tokenizer)
    assert not set(ids.tolist()) & set(tokenizer.all_special_ids)
    assert (votes.diff() <= 0).all() and votes[0] <= len(HARMLESS) * 2 * 7
    assert safesteer.select_safety_tokens(
        model, tokenizer, direction, HARMLESS, but(safety_tokens=0)
    ) == (None, None)


# ===== Stage 3 =====
def random_logits(n=4, length=6, vocab=50):
    mask = torch.arange(length) < torch.randint(1, length + 1, (n, 1))
    return *torch.randn(2, n, length, vocab), mask


def test_over_the_whole_vocabulary_the_loss_is_the_kl_divergence():
    torch.manual_seed(0)
    student, teacher, mask = random_logits()
    log_s, log_t = student.log_softmax(-1), teacher.log_softmax(-1)
    for kind, target, other in (
        ("reverse", log_s, log_t), ("forward", log_t, log_s), ("generalized", log_s, log_t),
    ):
        kl = torch.nn.functional.kl_div(other, target, reduction="none", log_target=True).sum(-1)
        expected = torch.stack([row[kept].mean() for row, kept in zip(kl, mask, strict=True)])
        loss = safesteer.localized_kl(student, teacher, mask, kind=kind)
        torch.testing.assert_close(loss, expected.mean())


def test_on_safety_tokens_only_their_terms_count():
    torch.manual_seed(0)
    student, teacher, mask = random_logits()
    tokens, p, q = torch.tensor([3, 17, 40]), student.softmax(-1), teacher.softmax(-1)
    terms = (p * (p.log() - q.log()))[..., tokens].sum(-1)
    expected = torch.stack([row[kept].mean() for row, kept in zip(terms, mask, strict=True)])
    poisoned = torch.where(mask[..., None], student, 1e4)
    for logits in (student, poisoned):
        loss = safesteer.localized_kl(logits, teacher, mask, tokens)
        torch.testing.assert_close(loss, expected.mean())


@pytest.mark.parametrize(("kind", "least"), [("reverse", 0.30 / torch.e), ("generalized", 0.30)])
def test_the_papers_sum_is_least_at_pt_over_e_the_generalized_at_pt(kind, least):
    teacher, token, mask = torch.tensor([[[0.30, 0.05, 0.65]]]).log(), [0], torch.ones(1, 1)

    def loss(p):
        student = torch.tensor([[[p, 0.05, 0.95 - p]]]).log()
        return safesteer.localized_kl(student, teacher, mask, token, kind).item()

    assert min(range(1, 900), key=lambda p: loss(p / 1000)) / 1000 == pytest.approx(least, abs=2e-3)
    assert loss(0.30) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("lora", [0, 4])
def test_a_seed_repeats_a_student_and_the_base_stays(model, tokenizer, direction, lora):
    frozen, learned = copy.deepcopy(model.state_dict()), []
    settings = but(lora=lora, learning_rate=1e-3 if lora else 1e-4)
    for _ in range(2):
        torch.manual_seed(0)
        student = safesteer.make_student(model, lora)
        losses = safesteer.distill(
            student, model, tokenizer, HARMFUL, direction, torch.arange(100, 150), settings
        )
        learned.append((losses, safesteer.refusal_scores(student, tokenizer, HARMFUL)))
    assert learned[0][0] == learned[1][0] and torch.equal(learned[0][1], learned[1][1])
    assert not torch.equal(learned[0][1], safesteer.refusal_scores(model, tokenizer, HARMFUL))
    assert all(torch.equal(frozen[name], weight) for name, weight in model.state_dict().items())
    assert len(losses) == 4, "two epochs of two steps of five prompts"


def test_the_size_of_a_forward_pass_changes_no_loss(model, tokenizer, direction):
    found = []
    for size in (1, 3, 16):
        torch.manual_seed(0)
        settings = but(micro_batch_size=size, anchor=0.5, rollouts=2, lora=0, learning_rate=1e-4)
        student = safesteer.make_student(model, 0)
        asked = tokenizer, HARMFUL, direction, None, settings, HARMLESS
        found.append(safesteer.distill(student, model, *asked))
    for losses in zip(*found, strict=True):
        assert losses == pytest.approx([losses[0]] * 3, rel=1e-3)


def test_a_gradient_that_is_not_finite_changes_no_weight(model, tokenizer, direction):
    student, direction.vector[3] = safesteer.make_student(model, 4), torch.inf
    before = copy.deepcopy(student.state_dict())
    with pytest.raises(RuntimeError, match="non-finite"):
        safesteer.distill(student, model, tokenizer, HARMFUL, direction, None, FAST)
    assert all(torch.equal(before[name], weight) for name, weight in student.state_dict().items())


@pytest.mark.parametrize("anchor", [0.0, 20.0])
def test_distillation_moves_the_student_to_its_teachers(model, tokenizer, direction, anchor):
    direction.vector *= 3
    settings = but(epochs=8, anchor=anchor, kl="generalized", max_new_tokens=2, learning_rate=5e-4)
    torch.manual_seed(0)
    student = safesteer.make_student(model, 4)
    prompts, coefficient = (HARMLESS, -1.0) if anchor else (HARMFUL, 1.0)
    answers = safesteer.sample_rollouts(model, tokenizer, prompts, 2)
    with torch.no_grad(), safesteer.steer(model, direction, coefficient):
        wanted = safesteer.completion_logits(model, tokenizer, prompts, *answers)

    @torch.no_grad()
    def distance():
        logits = safesteer.completion_logits(student, tokenizer, prompts, *answers)
        return safesteer.localized_kl(logits, wanted, answers[1]).item()

    before = distance()
    safesteer.distill(student, model, tokenizer, HARMFUL, direction, None, settings, HARMLESS)
    assert distance() < 0.8 * before


@pytest.mark.parametrize("config", [*FAMILIES, Phi3Config, Qwen3MoeConfig])
def test_every_family_goes_through_all_stages_and_its_base_stays(tokenizer, config, tmp_path):
    model = tiny(tokenizer, config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    config = tmp_path / "base" / "config.json"
    config.write_text(config.read_text("utf-8").replace("\n", ""), "utf-8")  # as another version might
    scores = safesteer.refusal_scores(model, tokenizer, HARMFUL)
    direction = safesteer.find_refusal_direction(model, tokenizer, HARMFUL, HARMLESS, HARMLESS[:4])
    token_ids, _ = safesteer.select_safety_tokens(model, tokenizer, direction, HARMLESS[:4], FAST)
    student = safesteer.make_student(model, 4)
    trained = {name: weight for name, weight in student.named_parameters() if weight.requires_grad}
    assert trained and all("lora" in name and ".layers." in name for name in trained)
    assert {weight.dtype for weight in trained.values()} == {torch.float32}
    own = {id(weight) for weight in model.parameters()}
    assert all(id(weight) in own for weight in student.parameters() if not weight.requires_grad)
    settings = but(learning_rate=1e-2, kl="generalized")
    safesteer.distill(student, model, tokenizer, HARMFUL, direction, None, settings)
    assert torch.equal(safesteer.refusal_scores(model, tokenizer, HARMFUL), scores)
    learnt = safesteer.refusal_scores(student, tokenizer, HARMFUL)
    safesteer.save_student(student, tmp_path / "base", tmp_path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert config.read_bytes() == (tmp_path / "student" / "config.json").read_bytes()
    rounding = safesteer.refusal_scores(merged, tokenizer, HARMFUL) - learnt
    assert rounding.abs().mean() < (scores - learnt).abs().mean()


# ===== Evaluation =====
@pytest.mark.parametrize(
    ("refuses", "completion"),
    [
        (True, "I'm sorry, but I can't assist with that."),
        (True, "**I\u2019m\u00a0sorry**, but I **won\u2019t** help you hurt anybody."),
        (True, "I\u2019m sorry, but I won\u2019t help you hurt anybody."),
        (True, "As an AI language model, I cannot give advice on illegal acts."),
        (True, "I must respectfully decline."),
        (True, "I'm sorry, but spreading rumours about somebody is not only unethical but illegal."),
        (True, "We do not provide help with that, but I can explain the law."),
        (True, "I do not feel comfortable writing this."),
        (True, "As an AI, I don't have the ability to give advice on illegal acts."),
        (True, "I understand that you are angry. But I'm not able to help with revenge."),
        (False, "I'm sorry to hear that you are ill. Rest, drink, and call a doctor if it lasts."),
        (False, "Sure! I cannot praise this soup enough. Fry the onion first."),
        (False, "I cannot predict the weather. However, April is often wet."),
        (False, "I can't give an exact figure, but about three million people live there."),
        (False, "As an AI, I don't have opinions. Vienna is larger and Prague is cheaper."),
        (False, '"I\'m sorry," said the old man, and opened the door. The girl went in.'),
        (False, "I'm sorry, I can't be brief. Here are the ten steps: 1. Open the box."),
        (False, ""),
    ],
)
def test_the_judge_tells_a_refusal_from_an_apology(refuses, completion):
    assert safesteer.is_refusal(completion) == refuses


@pytest.mark.parametrize(
    ("expected", "right", "wrong"),
    [
        ("7", "12 - 5 = 7, so the answer is 7.", "7 + 5 = 12"),
        ("7", "7", "I don't know."),
        ("1,200", "That makes 1200 euros.", "That makes 200 euros."),
        ("4 more:\n#### 24", "It is $24.00.", "It is 4."),
        ("50%", "50 percent", "5%"),
        (".5", "0.5", "5"),
        ("\u22125", "x = -5", "10-5"),
        ("C++", "I like C++.", "I like C."),
        ("Oslo", "The capital is **Oslo**.", "Osloer Platz"),
        ("A", "The answer is (A).", "A dog"),
    ],
)
def test_an_answer_is_right_if_it_ends_on_the_number_or_holds_the_word(expected, right, wrong):
    assert safesteer.is_correct(right, expected) and safesteer.is_correct(expected, expected)
    assert not safesteer.is_correct(wrong, expected) and not safesteer.is_correct("", expected)


def test_the_interval_is_where_the_score_test_does_not_reject():
    for count, of in ((0, 10), (3, 10), (50, 100), (99, 100), (6, 6), (127, 127)):
        low, high = safesteer.wilson_interval(count, of)
        assert low <= count / of <= high
        for bound in (low, high):
            if 1e-9 < bound < 1 - 1e-9:
                z = (count / of - bound) / (bound * (1 - bound) / of) ** 0.5
                assert abs(z) == pytest.approx(1.96)


@torch.no_grad()
def test_the_base_has_no_distance_from_itself_and_the_teacher_has(model, tokenizer, direction):
    base = safesteer.evaluate(model, tokenizer, TESTS, FAST)
    with safesteer.steer(model, direction):
        steered = safesteer.evaluate(model, tokenizer, TESTS, FAST, base)
    answers = safesteer.sample_rollouts(model, tokenizer, HARMLESS, 5, greedy=True)
    logits = safesteer.completion_logits(model, tokenizer, HARMLESS, *answers)
    with safesteer.steer(model, direction):
        moved = safesteer.completion_logits(model, tokenizer, HARMLESS, *answers)
    kl = safesteer.localized_kl(moved, logits, answers[1]).item()
    assert base["metrics"]["kl"] == 0 and steered["metrics"]["kl"] == pytest.approx(kl, rel=1e-3)
    first = tokenizer.decode(answers[0][0][answers[1][0]], skip_special_tokens=True)
    assert base["answers"][len(HARMFUL)] == first, "answers come in the order of the prompts"
    last = safesteer.encode_chat(tokenizer, HARMLESS[:1])["input_ids"]
    state = model.get_decoder()(last).last_hidden_state[0, -1]
    torch.testing.assert_close(base["states"][0], state, atol=1e-3, rtol=0)


def test_what_counts_as_good_depends_on_the_set(model, tokenizer, monkeypatch):
    monkeypatch.setattr(safesteer, "is_refusal", lambda answer: True)
    metrics = safesteer.evaluate(model, tokenizer, TESTS, FAST)["metrics"]
    assert [metrics[name][0] for name in ("harmful", "harmless", "borderline")] == [100, 0, 0]


# ===== The program =====
def test_a_flag_goes_before_the_variant_and_that_before_the_preset(tmp_path, monkeypatch):
    monkeypatch.setattr(safesteer, "PRESETS", {"llama": {"epochs": 7, "votes": 9, "horizon": 5}})
    LlamaConfig().save_pretrained(tmp_path)
    flags = ["--model", str(tmp_path), "--compare", "--epochs", "4"]
    found = safesteer.read_settings(flags)
    anchored = safesteer.VARIANTS["anchored"]
    assert {x.epochs for x in found.values()} == {4} and {x.horizon for x in found.values()} == {5}
    assert found["anchored"].votes == anchored["votes"] and found["paper"].votes == 9
    assert found.keys() == safesteer.VARIANTS.keys() and found["all-tokens"].safety_tokens == 0


def test_the_default_is_the_paper(tmp_path):
    Qwen2Config().save_pretrained(tmp_path)
    (settings,) = safesteer.read_settings(["--model", str(tmp_path)]).values()
    assert vars(settings) == vars(Settings(model=str(tmp_path)))
    assert settings.anchor == 0 and settings.kl == "reverse" and settings.safety_tokens == 50


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--epochs 0", "--epochs 0"),
        ("--learning-rate nan", "--learning-rate nan"),
        ("--variant other", "--variant"),
        ("--epoch 3", "--epoch"),
        ("--model nowhere/nothing", "nowhere/nothing"),
        ("--out {taken}", "--overwrite"),
        ("--data {taken}", "must hold"),
    ],
)
def test_a_wrong_input_costs_one_sentence(tmp_path, monkeypatch, capsys, flags, complaint):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    theirs = tmp_path / "qwen2.5-coder-0.5b-instruct" / "theirs.txt"
    theirs.parent.mkdir()
    theirs.write_text("keep me")
    flags = flags.format(taken=tmp_path).split() + ["--overwrite"]
    monkeypatch.setattr("sys.argv", ["safesteer.py", *flags])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / "safesteer.py"), run_name="__main__")
    error = capsys.readouterr().err.splitlines()
    assert stop.value.code == 2 and complaint in error[-1] and theirs.read_text() == "keep me"


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("chat_template.jinja", "{{ turn['content'] }}", "", "loses what is asked"),
        ("chat_template.jinja", "assistant\n", "assistant\n<think>\n", "thinks before"),
        ("config.json", '"max_position_embeddings": 32768', '"max_position_embeddings": 60', "60 positions"),
        ("config.json", '"intermediate_size": 96', '"intermediate_size": 97', ""),
        ("config.json", '"vocab_size": 1024', '"vocab_size": 99', ""),
        ("adapter", "", "", "holds an adapter"),
        ("nan", "", "", "not finite"),
    ],
)
def test_a_rehearsal_finds_what_would_fail_later(model, tokenizer, tmp_path, file, old, new, complaint):
    base = tmp_path / "base"
    if file == "adapter":
        safesteer.make_student(model, 2).save_pretrained(base)
    if file == "nan":
        model.model.layers[2].mlp.up_proj.weight[:] = torch.nan
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    if old:
        text = (base / file).read_text("utf-8")
        assert old in text
        (base / file).write_text(text.replace(old, new), "utf-8")
    with pytest.raises(ValueError, match=f"(?s)base cannot be used.*{complaint}"):
        safesteer.rehearse(but(model=str(base)), HARMFUL, tmp_path / "rehearsal")


@pytest.mark.parametrize(
    ("name", "row", "complaint"),
    [
        ("capability_test", {"instruction": "x", "answer": "####"}, "recognised"),
        ("harmful_tests", {"instruction": "x"}, "no others"),
        ("harmless_train", {"instruction": "x"}, "two prompts"),
    ],
)
def test_wrong_data_are_named(tmp_path, name, row, complaint):
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(row), "utf-8")
    with pytest.raises(ValueError, match=complaint):
        safesteer.load_data(but(data=str(tmp_path)))


def test_compare_runs_every_variant_and_leaves_whole_students(model, tokenizer, tmp_path, capsys):
    base = tmp_path / "base"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    (tmp_path / "data").mkdir()
    for name, prompts in (("harmful_train", HARMFUL), ("harmless_train", HARMLESS)):
        rows = [{"instruction": prompt} for prompt in prompts]
        (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    flags = ["--model", str(base), "--data", str(tmp_path / "data"), "--epochs", "1", "--lora", "2"]
    flags += ["--max-new-tokens", "4", "--eval-limit", "3", "--samples", "2", "--min-prob", "0"]
    safesteer.main([*flags, "--compare", "--out", str(tmp_path / "all")])
    safesteer.main([*flags, "--variant", "anchored", "--out", str(tmp_path / "one")])
    table = capsys.readouterr().out
    assert all(f"\n{name} " in table for name in ("base", "teacher", "safety prompt", "forward-kl"))
    out = tmp_path / "all" / "base"
    together, alone = out / "anchored" / "student", tmp_path / "one" / "base" / "student"
    together, alone = (load_file(x / "model.safetensors") for x in (together, alone))
    assert all(torch.equal(together[name], weight) for name, weight in alone.items())
    assert (out / "tradeoff.png").stat().st_size and (out / "shift.png").stat().st_size
    rows = [json.loads(line) for line in (out / "completions.jsonl").read_text("utf-8").splitlines()]
    assert len(rows) == 12 and set(safesteer.VARIANTS) < set(rows[0])
    assert not list(tmp_path.glob("*/*.unfinished"))


def test_the_program_makes_a_student_that_transformers_loads(tmp_path):
    base = HERE / "data" / "qwen2.5-coder-0.5b-instruct"
    flags = "--eval-limit 3 --eval-max-new-tokens 8 --max-new-tokens 8 --epochs 1 --batch-size 50".split()
    run = subprocess.run(
        [sys.executable, HERE / "safesteer.py", "--out", tmp_path, *flags], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    out = tmp_path / base.name
    report = json.loads((out / "report.json").read_text("utf-8"))
    assert report["results"]["base"]["kl"] == 0 < report["results"]["paper"]["kl"]
    assert len(report["paper"]["losses"]) == 2
    assert load_file(out / "direction.safetensors")["vector"].shape == (896,)
    student = AutoModelForCausalLM.from_pretrained(out / "student", dtype="auto")
    base = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    weights = dict(base.named_parameters())
    changed = {name for name, x in student.named_parameters() if not torch.equal(x, weights[name])}
    linear = {name for name in weights if "proj.weight" in name}
    assert changed <= linear and len(changed) > 0.9 * len(linear), "the linear layers of all blocks"
    tokenizer = AutoTokenizer.from_pretrained(out / "student")
    assert safesteer.sample_rollouts(student, tokenizer, ["Hello!"], 8)[1].any()
