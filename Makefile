# make demo: environment, toy data, tokenizer, transformers, a few GIFs. A stage that is finished is not done again.
# make test: the tests.
PY = .venv/bin/python
DONE = out/toy/.done
HALF = $(shell python3 -c 'import os; print(max(1, (os.cpu_count() or 2) // 2))')
export PYTHONUNBUFFERED = 1

demo: $(DONE)-len
	$(PY) sample.py config/toy.py --prompts=config/demo_prompts.txt
	@echo "Look at out/toy/samples/*.gif. Next: $(PY) sample.py config/toy.py --prompt=\"a person turns left, then jumps\""

.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/toy/meta.json: .venv/ready
	$(PY) prepare_data.py toy

$(DONE)-vq: data/toy/meta.json
	$(PY) train_vq.py config/toy.py
	touch $@

# The two transformers need only the tokenizer: side by side on half the cores each they take 60% of the time in turn.
$(DONE)-mask: $(DONE)-vq
	export OMP_NUM_THREADS=$(HALF); $(PY) train_mask.py config/toy.py --stage=res > out/toy/res.log 2>&1 & \
	export OMP_NUM_THREADS=$(HALF); $(PY) train_mask.py config/toy.py && wait $$! || { cat out/toy/res.log; exit 1; }
	touch $@

$(DONE)-len: $(DONE)-mask
	$(PY) train_mask.py config/toy.py --stage=len
	touch $@

test: .venv/ready
	$(PY) -m pytest -q

.PHONY: demo test
