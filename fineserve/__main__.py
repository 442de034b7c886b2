from fineserve.cli import main

main()
