"""The road in five steps: python five_steps.py, under a minute on a laptop.

Another model and text: python five_steps.py owner/model notes.txt
"""

import sys
from itertools import islice

from companion import (
    W2,
    convert,
    fit,
    load_pretrained,
    load_task,
    perplexity,
    prepare_qat,
    save_quantized,
)
from companion.course.sources import load_tokenizer

name, text = (sys.argv[1:] + ["docs-lm", "language-reference"])[:2]

# 1. A pre-trained model, and text it has not read, in three parts.
model = load_pretrained(name)
task = load_task(text, tokenizer=load_tokenizer(name))

# 2. Fine-tune in floating point: the control, and the teacher.
fit(model, task.train, steps=30, lr=5e-4)

# 3. Prepare: a copy that is rounded to two bits as it computes.
qat = prepare_qat(model, W2, calibration=islice(task.train, 4))

# 4. Train under rounding; the float model is imitated.
fit(qat, task.train, steps=10, lr=5e-4, teacher=model)

# 5. Convert to packed integers, and compare with what cost nothing.
small = convert(qat)
nearest = convert(prepare_qat(model, W2, "absmax"))
for kind, m in (("float", model), ("rounded", nearest), ("trained", small)):
    print(f"{kind:8} perplexity {perplexity(m, task.test)}")
print("saved to", save_quantized(small, "five-steps-w2"))
