"""python -m pml_fewshot.evaluate RUN: evaluates a run's trained weights on other episodes, data or metrics."""

from pml_fewshot.experiment.trained import main

if __name__ == "__main__":
    main()
