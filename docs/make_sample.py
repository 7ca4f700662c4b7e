"""Write docs/sample.svg, the README's picture: a held-out prompt of an experiment, completed and coloured by call.

python docs/make_sample.py experiments/demo --prompt-number 0
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ptp import Decoder, PTPModel
from ptp.decoding.plain import decode_plainly
from ptp.decoding.requests import make_request
from ptp.evaluation.report import Sample, coloured_svg, pieces
from ptp.experiment import Experiment
from ptp.model.loading import load_tokenizer
from ptp.stages.train import validation_prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--prompt-number", type=int, default=0)
    parser.add_argument("--budget", type=int, default=12)
    arguments = parser.parse_args()
    experiment = Experiment.load(arguments.directory)
    prompt = validation_prompts(experiment, arguments.prompt_number + 1)[-1]
    tokenizer = load_tokenizer(experiment.base_model)
    model = PTPModel.from_pretrained(arguments.directory)
    decoder = Decoder(model, budget=arguments.budget)
    request = make_request(model.base_model, prompt, max_new_tokens=128, seed=0, sequence=arguments.prompt_number)
    generation = decoder.answer(request)
    sample = Sample(
        prompt=tokenizer.decode(prompt, skip_special_tokens=True),
        pieces=pieces(generation, lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True))),
        tokens_per_call=generation.tokens_per_call,
        num_calls=generation.num_calls,
        lossless=decode_plainly(model.base_model, request, decoder.rule) == generation.token_ids,
    )
    Path(__file__).with_name("sample.svg").write_text(coloured_svg(sample), encoding="utf-8")


if __name__ == "__main__":
    main()
