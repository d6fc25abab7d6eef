//! What a program can set at its start.

/// Asks the C allocator to keep freed memory for the next operation instead of
/// returning it to the system, which would fill it with zeros again, page by page:
/// tensors of a few megabytes cost several times as much then.
///
/// For programs, at their start; a library should not decide this. Does nothing
/// where the allocator is not glibc's.
#[cfg_attr(all(target_os = "linux", target_env = "gnu"), allow(unsafe_code))]
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only changes tuning parameters of the allocator; it is called
    // with documented parameters and may be called at any time.
    unsafe {
        // Never a mapping of its own for one block, never give memory back.
        libc::mallopt(libc::M_MMAP_MAX, 0);
        libc::mallopt(libc::M_TRIM_THRESHOLD, -1);
        libc::mallopt(libc::M_TOP_PAD, 64 << 20);
    }
}

/// Makes candle's own elementwise operations run on the calling thread, unless
/// `CANDLE_NUM_THREADS` is set.
///
/// candle has a pool of threads for them beside rayon's, whose threads wait for work and for
/// one another in loops that never sleep. They take processor time from the products here,
/// and where other programs run, an addition of two tensors takes as long as a product.
///
/// For programs, as the first thing they do: it sets an environment variable, and does so
/// only while the process has no other thread and where it can find that out (Linux).
#[allow(unsafe_code)]
pub fn keep_candle_to_one_thread() {
    const NAME: &str = "CANDLE_NUM_THREADS";
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    if std::env::var_os(NAME).is_none() && matches!(threads, Ok(1)) {
        // SAFETY: there is no other thread that could read or write the environment.
        unsafe { std::env::set_var(NAME, "1") };
    }
}
