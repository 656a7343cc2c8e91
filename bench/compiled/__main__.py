import sys

from bench.compiled.compile import main

sys.exit(main())
