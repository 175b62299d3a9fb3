"""`python -m ssl_bench` is `ssl-bench`."""

from ssl_bench.command import main

main()
