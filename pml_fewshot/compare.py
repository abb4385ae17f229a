"""python -m pml_fewshot.compare RUN RUN ...: finished runs side by side, with their paired differences."""

import sys

from pml_fewshot.experiment.comparison import main

if __name__ == "__main__":
    main()
else:  # `import pml_fewshot.compare` must not replace the function of that name with this module
    from pml_fewshot.evaluation.statistics import compare

    sys.modules[__name__] = compare  # type: ignore[assignment]
