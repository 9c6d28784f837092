"""Train the language policy of the repository by reinforcement learning with a verifiable reward.

    pip install -c constraints.txt trl
    python benchmarks/train_arithmetic_policy.py

A Llama of 1.05 million parameters, one token a character, that adds and subtracts numbers of up to three digits, its
answers with the last digit first (`quantkit.tasks.reward.arithmetic`). It learns in three parts:

taught      the next token of random problems with their solutions, until it answers 60 % of the validation problems,
            and at a lower learning rate until it answers 95 %;
careless    the same with a teacher who in 60 % of the solutions forgets all carries and borrows, 60 steps;
grpo        by TRL's GRPO (Shao et al., arXiv 2402.03300) with the task's reward alone, in groups of 8 sampled answers
            and, as is TRL's default, without a KL penalty, until it answers 95 % again.

So the reward decides between two ways of reckoning that the text has taught it, as in larger models, and it is what
brings the exact match from that of the careless policy to that of the last. Reward alone was too slow a teacher of
carrying: from a policy that had half learned it, 80 steps raised the exact match from 62 % to 67 %.

Validation is by greedy decoding on 500 problems of a seed of its own. Two and a half minutes of one core.
The curve goes to reports/language/arithmetic_training.csv, the model to benchmarks/agents/arithmetic.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.nn.functional as F
from report import REPORTS, publish
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from quantkit.tasks.reward import Reward, arithmetic, evaluate, solution, verify_arithmetic

FOLDER = Path(__file__).parent / "agents" / "arithmetic"
PAD, END = 0, 1
SYMBOLS = ("<pad>", "<end>", *"0123456789+-=")
VALIDATION = 900_000
"""The seed of the validation problems."""


@dataclass(frozen=True)
class Args:
    """Command line."""

    seed: int
    goal: float
    steps: int
    lr: float
    prompts: int
    out: Path


def make_tokenizer() -> Tokenizer:
    """One token a character; the two special tokens are not text."""
    tokenizer = Tokenizer(models.WordLevel({s: i for i, s in enumerate(SYMBOLS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(["<pad>", "<end>"])
    return tokenizer


def make_policy() -> LlamaForCausalLM:
    """Four blocks of width 128."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=16,
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=64,
            initializer_range=0.06,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
        )
    )


def slip(prompt: str) -> str:
    """The answer of one who forgets to carry and to borrow.

    >>> slip("58+7="), slip("123-45=")
    ('55', '881')
    """
    sign = 1 if "+" in prompt else -1
    a, b = (map(int, number.zfill(3)) for number in prompt.rstrip("=").replace("-", "+").split("+"))
    digits = [(x + sign * y) % 10 for x, y in zip(a, b, strict=True)]
    return str(int("".join(map(str, digits))))[::-1]


def lesson(tokenizer: Tokenizer, n: int, seed: int, careless: float = 0.0) -> tuple[Tensor, Tensor]:
    """Problems with solutions (n, tokens), padded on the right, and what is to be predicted, -100 elsewhere.

    careless: the share of solutions that are slips.
    """
    ids, wanted, draw = [], [], random.Random(seed)
    for prompt in arithmetic(n, seed).prompts:
        text = slip(prompt) if draw.random() < careless else solution(prompt)
        question, answer = tokenizer.encode(prompt).ids, [*tokenizer.encode(text).ids, END]
        ids.append(torch.tensor(question + answer))
        wanted.append(torch.tensor([-100] * len(question) + answer))
    pad = torch.nn.utils.rnn.pad_sequence
    return pad(ids, batch_first=True, padding_value=PAD), pad(wanted, batch_first=True, padding_value=-100)


class Curve(TrainerCallback):
    """Rows of the training curve, with a validation at each; GRPO ends where its exact match is `goal`."""

    def __init__(self, policy: LlamaForCausalLM, tokenizer: Tokenizer, goal: float) -> None:
        self.policy, self.tokenizer, self.goal = policy, tokenizer, goal
        self.rows: list[dict[str, Any]] = []
        self.began = time.process_time()

    def note(self, phase: str, step: int, **values: float) -> Reward:
        """Evaluate and print."""
        self.policy.eval()
        score = evaluate(self.policy, self.tokenizer, arithmetic(500, VALIDATION), end=END)
        self.policy.train()
        found = {"phase": phase, "step": step, "cpu_seconds": round(time.process_time() - self.began)}
        found |= {"loss": "", "sampled_reward": "", "entropy": "", **{k: round(v, 4) for k, v in values.items()}}
        found |= {"reward": round(score.mean, 4), "stderr": round(score.stderr, 4), "exact_match": score.exact_match}
        self.rows.append(found)
        print(found, flush=True)
        return score

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Every `logging_steps` of GRPO; its reward is that of the sampled answers trained on."""
        if "reward" in logs:
            score = self.note("grpo", state.global_step, sampled_reward=logs["reward"], entropy=logs["entropy"])
            control.should_training_stop = score.exact_match >= self.goal


def teach(
    policy: LlamaForCausalLM, tokenizer: Tokenizer, curve: Curve, seed: int, *, first: int = 1, lr: float, goal: float
) -> int:
    """Next token of right solutions until `goal` is reached, with an optimizer of its own; number of the last step."""
    optimizer = make_optimizer(policy)
    for step in range(first, 5000):
        loss = learn(
            policy, optimizer, lr * min(1.0, (step - first + 1) / 100), *lesson(tokenizer, 64, seed * 10_000 + step)
        )
        if step % 50 == 0 and curve.note("taught", step, loss=loss).exact_match >= goal:
            break
    return step


def mislead(policy: LlamaForCausalLM, tokenizer: Tokenizer, curve: Curve, seed: int, steps: int = 60) -> None:
    """Next token of solutions most of which are slips."""
    optimizer = make_optimizer(policy)
    for step in range(1, steps + 1):
        loss = learn(policy, optimizer, 5e-4, *lesson(tokenizer, 64, seed * 10_000 + 5000 + step, careless=0.6))
        if step % 30 == 0:
            curve.note("careless", step, loss=loss)


def make_optimizer(policy: LlamaForCausalLM) -> torch.optim.Optimizer:
    """Of the supervised parts."""
    return torch.optim.AdamW(policy.parameters(), betas=(0.9, 0.98), weight_decay=0.1)


def learn(policy: LlamaForCausalLM, optimizer: torch.optim.Optimizer, lr: float, ids: Tensor, wanted: Tensor) -> float:
    """One supervised step; its loss."""
    optimizer.param_groups[0]["lr"] = lr
    logits = policy(ids, use_cache=False).logits
    loss = F.cross_entropy(logits[:, :-1].transpose(1, 2), wanted[:, 1:], ignore_index=-100)
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def reinforce(start: str, tokenizer: Tokenizer, curve: Curve, args: Args) -> LlamaForCausalLM:
    """GRPO on the task's reward, from the policy in the folder `start`."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    def reward(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
        return [verify_arithmetic(p, c) for p, c in zip(prompts, completions, strict=True)]

    config = GRPOConfig(
        output_dir=start,
        max_steps=args.steps,
        per_device_train_batch_size=8 * args.prompts,
        num_generations=8,
        max_completion_length=6,
        learning_rate=args.lr,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=10,
        loss_type="grpo",
        logging_steps=10,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        seed=args.seed,
    )
    problems = arithmetic(args.steps * args.prompts, seed=args.seed + 1).prompts
    trainer = GRPOTrainer(
        start,
        reward_funcs=reward,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": list(problems)}),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>"),
        callbacks=[curve],
    )
    curve.policy = trainer.model
    trainer.train()
    return curve.policy


def main(args: Args) -> None:
    """Train, evaluate and save."""
    torch.set_num_threads(1)
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    tokenizer, policy = make_tokenizer(), make_policy()
    print(f"{sum(p.numel() for p in policy.parameters()):,} parameters")
    curve = Curve(policy, tokenizer, args.goal)
    done = teach(policy, tokenizer, curve, args.seed, lr=1e-3, goal=0.6)
    teach(policy, tokenizer, curve, args.seed, first=done + 1, lr=6e-4, goal=args.goal)
    mislead(policy, tokenizer, curve, args.seed)
    with TemporaryDirectory() as start:
        policy.save_pretrained(start)
        policy = reinforce(start, tokenizer, curve, args)
    policy.eval()
    policy.config.use_cache = True
    args.out.mkdir(parents=True, exist_ok=True)
    policy.save_pretrained(args.out)
    tokenizer.save(str(args.out / "tokenizer.json"))
    (args.out / "generation_config.json").unlink(missing_ok=True)
    for temperature in (0.0, 1.0):
        score = evaluate(policy, tokenizer, arithmetic(2000, seed=1000), end=END, temperature=temperature)
        print(
            f"temperature {temperature}: reward {score.mean:.4f} +- {score.stderr:.4f}, exact {score.exact_match:.4f}"
        )
    (REPORTS / "language").mkdir(exist_ok=True)
    publish("language/arithmetic_training", curve.rows, packages=("torch", "transformers", "trl"), title="arithmetic")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--goal", type=float, default=0.95, help="exact match at which teaching and GRPO stop")
    parser.add_argument("--steps", type=int, default=300, help="of GRPO at most")
    parser.add_argument("--lr", type=float, default=2.5e-4, help="of GRPO")
    parser.add_argument("--prompts", type=int, default=32, help="problems of a step, 8 answers each")
    parser.add_argument("--out", type=Path, default=FOLDER)
    main(Args(**vars(parser.parse_args())))
