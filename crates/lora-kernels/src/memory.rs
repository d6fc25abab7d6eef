//! What a program can set at its start, where it runs, and what a GPU has left.

use candle_core::Device;

/// Asks the C allocator to keep freed memory for the next operation instead of
/// returning it to the system, which would fill it with zeros again, page by page:
/// tensors of a few megabytes cost several times as much then.
///
/// All threads then share one heap. Threads that have begun to allocate keep their own, and what one
/// thread frees is lost to the others: call it first.
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
        // What one thread frees another may take; heaps of a thread's own cannot grow that far.
        libc::mallopt(libc::M_ARENA_MAX, 1);
    }
}

/// Makes candle's own elementwise operations run on the calling thread, unless
/// `CANDLE_NUM_THREADS` is set.
///
/// candle has a pool of threads for them beside rayon's, whose threads wait for work and for
/// one another in loops that never sleep. They take processor time from the products here,
/// and where other programs run, an addition of two tensors takes as long as a product.
///
/// Its products do run on rayon's threads, as many as `RAYON_NUM_THREADS` says. Where that is
/// not set, candle asks the system how many processors there are for each single product, which
/// on Linux reads a file; so it is set here, to the number that rayon would take.
///
/// For programs, as the first thing they do: it sets environment variables, and does so
/// only while the process has no other thread and where it can find that out (Linux).
#[allow(unsafe_code)]
pub fn keep_candle_to_one_thread() {
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let threads = std::fs::read_dir("/proc/self/task").map(Iterator::count);
    for (name, value) in [("CANDLE_NUM_THREADS", 1), ("RAYON_NUM_THREADS", processors)] {
        if std::env::var_os(name).is_none() && matches!(threads, Ok(1)) {
            // SAFETY: there is no other thread that could read or write the environment.
            unsafe { std::env::set_var(name, value.to_string()) };
        }
    }
}

/// Runs `f` on one of rayon's threads, where `device` is the CPU; elsewhere on the calling thread.
///
/// A thread of its own has to wake rayon's and to sleep until they are done for each operation that is
/// divided among them, which for small ones takes longer than the operation. One of rayon's
/// does its share itself. Worth it around many operations: a forward pass, a backward pass.
///
/// `f` must not wait for work that other threads of rayon's have yet to begin.
///
/// ```
/// use candle_core::{Device, Tensor};
/// let x = Tensor::new(&[3f32], &Device::Cpu)?;
/// let y = lora_kernels::on_worker(x.device(), || x.sqr())?;
/// assert_eq!(y.to_vec1::<f32>()?, [9.0]);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn on_worker<R: Send>(device: &Device, f: impl FnOnce() -> R + Send) -> R {
    match device.is_cpu() {
        true => rayon::scope(|_| f()),
        false => f(),
    }
}

/// Lets a CUDA device keep what was freed for the next operation. Otherwise it gives all of it
/// back to the driver whenever the program waits for a result, and asks for it again.
///
/// For programs, at their start; does nothing for other devices.
#[allow(unsafe_code)]
pub fn keep_freed_device_memory(device: &Device) {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        use candle_core::cuda_backend::cudarc::driver::sys;
        let keep = u64::MAX;
        // SAFETY: the device exists; the pool is written before it is read, and the attribute
        // is a u64 that the call reads.
        unsafe {
            let mut pool: sys::CUmemoryPool = std::ptr::null_mut();
            let cu_device = device.cuda_stream().context().cu_device();
            if sys::cuDeviceGetDefaultMemPool(&mut pool, cu_device) == sys::CUresult::CUDA_SUCCESS {
                sys::cuMemPoolSetAttribute(
                    pool,
                    sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD,
                    (&raw const keep).cast_mut().cast(),
                );
            }
        }
    }
    let _ = device;
}

/// Bytes of a GPU's own memory, free and in all; `None` for a CPU, and where the device does
/// not tell (Metal).
pub fn device_memory(device: &Device) -> Option<(usize, usize)> {
    #[cfg(feature = "cuda")]
    if let Device::Cuda(device) = device {
        return device.cuda_stream().context().mem_get_info().ok();
    }
    let _ = device;
    None
}
