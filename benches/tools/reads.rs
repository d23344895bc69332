//! Times reads of one large file: random pages by several threads, or all of it in order. Prints the seconds.
//!
//! Each thread has a descriptor of its own, as processes have, and reads at the same places in every run.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use clap::{Parser, Subcommand};

/// Bytes of a random read, which begins at a multiple of them.
const PAGE: u64 = 4096;
/// Bytes of a read of a file in order: what `cat` and `cp` ask for.
const BLOCK: usize = 128 << 10;

/// Times reads of one large file.
#[derive(Parser)]
struct Options {
    /// The file.
    file: PathBuf,
    #[command(subcommand)]
    how: How,
}

#[derive(Subcommand)]
enum How {
    /// Reads of 4 KiB anywhere.
    Random {
        /// Threads.
        #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=256))]
        threads: u64,
        /// Reads of all threads together.
        #[arg(long, default_value_t = 100_000)]
        reads: u64,
    },
    /// The whole file, once, from its beginning.
    Sequential,
}

fn main() -> anyhow::Result<()> {
    let options = Options::parse();
    let seconds = match options.how {
        How::Random { threads, reads } => random(&options.file, threads, reads / threads)?,
        How::Sequential => sequential(&options.file)?,
    };
    println!("{:.6}", seconds.as_secs_f64());
    Ok(())
}

fn sequential(path: &Path) -> anyhow::Result<Duration> {
    let mut buf = vec![0; BLOCK];
    let begin = Instant::now();
    let file = File::open(path)?;
    let mut offset = 0;
    loop {
        match file.read_at(&mut buf, offset)? {
            0 => return Ok(begin.elapsed()),
            len => offset += len as u64,
        }
    }
}

fn random(path: &Path, threads: u64, reads: u64) -> anyhow::Result<Duration> {
    let barrier = Barrier::new(threads as usize + 1);
    thread::scope(|scope| {
        let workers: Vec<_> = (1..=threads)
            .map(|seed| {
                let barrier = &barrier;
                scope.spawn(move || {
                    // Whatever happens, all come to the barrier.
                    let opened = File::open(path).and_then(|file| Ok((file.metadata()?.len() / PAGE, file)));
                    barrier.wait();
                    let (pages, file) = opened?;
                    let mut buf = [0; PAGE as usize];
                    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
                    for _ in 0..reads {
                        random ^= random << 13;
                        random ^= random >> 7;
                        random ^= random << 17;
                        file.read_exact_at(&mut buf, random % pages.max(1) * PAGE)?;
                    }
                    Ok::<_, std::io::Error>(())
                })
            })
            .collect();
        barrier.wait();
        let begin = Instant::now();
        for worker in workers {
            worker.join().expect("a reader does not panic")?;
        }
        Ok(begin.elapsed())
    })
}
