"""A process from its start to its first token: `python first_token.py ARGS`, the engine's arguments
as JSON. Prints what of that time was importing, opening the engine, and the token, as JSON."""

import json
import sys
import time

start = time.perf_counter()
from trimaran import LLM, SamplingParams  # noqa: E402

imported = time.perf_counter()
with LLM(**json.loads(sys.argv[1])) as llm:
    opened = time.perf_counter()
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": list(range(10, 26))}], params, use_tqdm=False)
    spent = {"import_s": imported - start, "open_s": opened - imported}
    print(json.dumps(spent | {"token_s": time.perf_counter() - opened}), flush=True)
