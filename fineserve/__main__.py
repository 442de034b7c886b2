from fineserve.cli.main import main

main()
