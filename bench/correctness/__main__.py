import sys

from bench.correctness.kernels import main

sys.exit(main())
