# make demo: environment, toy data, tokenizer, transformers, six GIFs. Finished stages are skipped, a
#            stage that was interrupted resumes
# make test: the tests
# make app:  the page in the browser, with what it needs
PY = .venv/bin/python
DONE = out/toy/.done
resume = $(if $(wildcard out/toy/$(1)_last.pt),--init_from=resume)
export PYTHONUNBUFFERED = 1

demo: $(DONE)-len
	$(PY) sample.py config/toy.py --prompts=config/demo_prompts.txt
	@echo "Look at out/toy/samples/*.gif. Then try:"
	@echo ". .venv/bin/activate"
	@echo "python sample.py config/toy.py --prompt=\"a person turns left, then jumps\""

.venv/ready: requirements.txt
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

data/toy/meta.json: .venv/ready
	$(PY) prepare_data.py toy

$(DONE)-vq: data/toy/meta.json
	$(PY) train_vq.py config/toy.py $(call resume,vq)
	$(PY) sample.py config/toy.py --reconstruct=toy-20000012
	touch $@

$(DONE)-mask: $(DONE)-vq
	$(PY) train_mask.py config/toy.py $(call resume,mask)
	$(PY) sample.py config/toy.py --prompt="a person jumps" --length=60 --samples_dir=out/toy/first
	touch $@

$(DONE)-res: $(DONE)-mask
	$(PY) train_mask.py config/toy.py --stage=res $(call resume,res)
	touch $@

$(DONE)-len: $(DONE)-res
	$(PY) train_mask.py config/toy.py --stage=len $(call resume,len)
	touch $@

.venv/app: requirements-app.txt .venv/ready
	.venv/bin/pip install --quiet --disable-pip-version-check -r requirements-app.txt
	touch $@

app: .venv/app
	$(PY) app.py config/toy.py

test: .venv/ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -n 2 --dist worksteal   # two workers of one thread each

.PHONY: demo app test
