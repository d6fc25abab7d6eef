//! Products of bf16 in the matrix registers of AMX: 16 rows of the left operand by 16 columns
//! of the right one at a time, 16 words (pairs of values) deep, sums in f32.
//!
//! Rust has no stable intrinsics for it, so the instructions are written out. The operands are
//! those of [`avx512`](crate::avx512) as they lie: a matrix register takes rows at any
//! distance from one another.

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};
use std::marker::PhantomData;
use std::sync::OnceLock;

/// Rows and columns of a register's sums, and the words added to each at a time.
pub(crate) const SIDE: usize = 16;

/// Whether the processor has it and the system lets this process use it.
pub(crate) fn available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_amx() && granted())
}

fn has_amx() -> bool {
    const BF16: u32 = 1 << 22;
    const TILE: u32 = 1 << 24;
    __cpuid(0).eax >= 7 && __cpuid_count(7, 0).edx & (BF16 | TILE) == BF16 | TILE
}

/// Asks the system for the registers' memory, for all threads: Linux wants to be asked.
fn granted() -> bool {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_ulong = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_ulong = 18;
        // SAFETY: this call reads its two numbers and writes no memory of ours.
        let error = unsafe {
            libc::syscall(
                libc::SYS_arch_prctl,
                ARCH_REQ_XCOMP_PERM,
                XFEATURE_XTILEDATA,
            )
        };
        error == 0
    }
    #[cfg(not(all(target_os = "linux", target_env = "gnu")))]
    false
}

/// The registers' shapes as `ldtilecfg` reads them.
#[repr(C, align(64))]
struct Shapes {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

/// Eight registers of 16 rows of 64 bytes.
const SHAPES: Shapes = {
    let mut shapes = Shapes {
        palette: 1,
        start_row: 0,
        reserved: [0; 14],
        bytes_per_row: [0; 16],
        rows: [0; 16],
    };
    let mut i = 0;
    while i < 8 {
        shapes.bytes_per_row[i] = 4 * SIDE as u16;
        shapes.rows[i] = SIDE as u8;
        i += 1;
    }
    shapes
};

/// The matrix registers of this thread, from [`Registers::take`] until they are dropped.
pub(crate) struct Registers(PhantomData<*const ()>);

impl Registers {
    /// # Safety
    /// [`available`] is true, and this thread has no others.
    pub(crate) unsafe fn take() -> Self {
        // SAFETY: the processor and the system allow it; the shapes are valid.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &SHAPES, options(nostack, readonly)) };
        Registers(PhantomData)
    }

    /// Sums, or adds to `c`, the products of `ROWS` times 16 rows of `a` and `COLUMNS` times
    /// 16 columns of `b` (1 or 2 each).
    ///
    /// # Safety
    /// The pointers are good for that many rows and columns, and for the words that the tile
    /// names.
    pub(crate) unsafe fn multiply<const ROWS: usize, const COLUMNS: usize>(
        &mut self,
        tile: &Tile<'_>,
    ) {
        const { assert!((ROWS == 1 || ROWS == 2) && (COLUMNS == 1 || COLUMNS == 2)) };
        let (c, c_stride) = (tile.c, tile.c_stride);
        let a1 = tile.a.wrapping_byte_add(SIDE * tile.a_stride);
        let c1 = c.wrapping_byte_add(SIDE * c_stride);
        macro_rules! begin {
            ($zero:literal, $load:literal, $from:expr) => {
                match tile.add {
                    true => {
                        asm!($load, in(reg) $from, in(reg) c_stride, options(nostack, readonly))
                    }
                    false => asm!($zero, options(nostack, nomem)),
                }
            };
        }
        macro_rules! end {
            ($store:literal, $to:expr) => {
                asm!($store, in(reg) $to, in(reg) c_stride, options(nostack))
            };
        }
        macro_rules! sum {
            ($($line:literal),*) => {
                asm!(
                    "2:",
                    "mov {offset}, {offsets}",
                    "mov {n}, {count}",
                    "3:",
                    "mov {at}, [{offset}]",
                    "add {at}, {b}",
                    "tileloadd tmm4, [{a0} + {a_stride}*1]",
                    "tileloadd tmm6, [{at} + {b_stride}*1]",
                    $($line,)*
                    "add {a0}, 64",
                    "add {a1}, 64",
                    "add {offset}, 8",
                    "dec {n}",
                    "jnz 3b",
                    "add {b}, {step}",
                    "dec {steps}",
                    "jnz 2b",
                    a0 = inout(reg) tile.a => _,
                    a1 = inout(reg) a1 => _,
                    a_stride = in(reg) tile.a_stride,
                    b = inout(reg) tile.b => _,
                    b_stride = in(reg) tile.b_stride,
                    offsets = in(reg) tile.offsets.as_ptr(),
                    count = in(reg) tile.offsets.len(),
                    step = in(reg) tile.step,
                    steps = inout(reg) tile.steps => _,
                    offset = out(reg) _,
                    at = out(reg) _,
                    n = out(reg) _,
                    options(nostack, readonly)
                )
            };
        }
        // SAFETY: the caller's word; beside the registers named only the matrix ones change,
        // which the compiler does not use.
        unsafe {
            begin!("tilezero tmm0", "tileloadd tmm0, [{} + {}*1]", c);
            if COLUMNS == 2 {
                begin!("tilezero tmm1", "tileloadd tmm1, [{} + {}*1 + 64]", c);
            }
            if ROWS == 2 {
                begin!("tilezero tmm2", "tileloadd tmm2, [{} + {}*1]", c1);
            }
            if ROWS == 2 && COLUMNS == 2 {
                begin!("tilezero tmm3", "tileloadd tmm3, [{} + {}*1 + 64]", c1);
            }
            if tile.steps > 0 && !tile.offsets.is_empty() {
                match (ROWS, COLUMNS) {
                    (1, 1) => sum!("tdpbf16ps tmm0, tmm4, tmm6"),
                    (1, _) => sum!(
                        "tileloadd tmm7, [{at} + {b_stride}*1 + 64]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tdpbf16ps tmm1, tmm4, tmm7"
                    ),
                    (_, 1) => sum!(
                        "tileloadd tmm5, [{a1} + {a_stride}*1]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tdpbf16ps tmm2, tmm5, tmm6"
                    ),
                    _ => sum!(
                        "tileloadd tmm7, [{at} + {b_stride}*1 + 64]",
                        "tdpbf16ps tmm0, tmm4, tmm6",
                        "tileloadd tmm5, [{a1} + {a_stride}*1]",
                        "tdpbf16ps tmm1, tmm4, tmm7",
                        "tdpbf16ps tmm2, tmm5, tmm6",
                        "tdpbf16ps tmm3, tmm5, tmm7"
                    ),
                }
            }
            end!("tilestored [{} + {}*1], tmm0", c);
            if COLUMNS == 2 {
                end!("tilestored [{} + {}*1 + 64], tmm1", c);
            }
            if ROWS == 2 {
                end!("tilestored [{} + {}*1], tmm2", c1);
            }
            if ROWS == 2 && COLUMNS == 2 {
                end!("tilestored [{} + {}*1 + 64], tmm3", c1);
            }
        }
    }

    /// [`multiply`](Self::multiply) for as many rows and columns as there are, 32 at most.
    ///
    /// # Safety
    /// As for `multiply`; both are 16 or more.
    pub(crate) unsafe fn multiply_up_to(&mut self, rows: usize, columns: usize, tile: &Tile<'_>) {
        // SAFETY: the caller's word.
        unsafe {
            match (rows >= 2 * SIDE, columns >= 2 * SIDE) {
                (true, true) => self.multiply::<2, 2>(tile),
                (true, false) => self.multiply::<2, 1>(tile),
                (false, true) => self.multiply::<1, 2>(tile),
                (false, false) => self.multiply::<1, 1>(tile),
            }
        }
    }
}

impl Drop for Registers {
    fn drop(&mut self) {
        // SAFETY: `take` has been called on this thread, where these values must stay: the
        // type is not `Send`.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// Where a product's operands and sums lie. Strides, between rows of `a` and `c` and between
/// words of `b`, offsets and step are in bytes.
///
/// The left operand is read 16 words after 16 words. So is the right one: from each of the
/// offsets in turn, then from all of them again a step further on.
#[derive(Clone, Copy)]
pub(crate) struct Tile<'a> {
    pub(crate) a: *const u16,
    pub(crate) a_stride: usize,
    pub(crate) b: *const u32,
    pub(crate) b_stride: usize,
    pub(crate) offsets: &'a [usize],
    pub(crate) step: usize,
    pub(crate) steps: usize,
    pub(crate) c: *mut f32,
    pub(crate) c_stride: usize,
    pub(crate) add: bool,
}
